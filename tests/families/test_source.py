"""Base models lie in folders of any layout or under pinned hub ids."""

import fnmatch
import shutil
from collections.abc import Sequence
from pathlib import Path

import httpx2
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file

from expunge.errors import InputError
from expunge.families import (
    deep_preflight,
    load_model,
    pinned_source,
    preflight,
    resolve_source,
    source_digest,
)
from expunge.families.architectures import architecture
from expunge.settings import ModelSettings
from tests.families.tiny import (
    COMMIT,
    REPOSITORY,
    Build,
    as_variant,
    at_the_root,
    ddim,
    ddpm,
    in_the_hubs_cache,
    same_network,
    sd3,
)

SIZE = (8, 8)
UNET = "unet/diffusion_pytorch_model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub's client."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def hub(revision: str = COMMIT) -> ModelSettings:
    return ModelSettings(source=REPOSITORY, revision=revision)


@pytest.mark.parametrize("build", [ddpm, ddim, at_the_root])
def test_unconditional_models_of_every_layout_are_loaded(build: Build, tmp_path: Path) -> None:
    folder = build(tmp_path / "model")
    options = ModelSettings(source=str(folder))
    assert preflight("mine", options) == SIZE
    same_network(options, next(folder.rglob("*.safetensors")))


def test_a_tilde_is_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = ddpm(tmp_path / "models" / "mine")
    same_network(ModelSettings(source="~/models/mine"), folder / f"{UNET}.safetensors")
    with pytest.raises(InputError, match="has no such user"):
        preflight("test", ModelSettings(source="~nobody-of-this-name/model"))


@pytest.mark.parametrize("build", [ddpm, at_the_root])
def test_a_pinned_hub_id_is_loaded_from_the_cache(build: Build, tmp_path: Path, cache: Path) -> None:
    snapshot = in_the_hubs_cache(build(tmp_path / "model"), cache)
    same_network(hub(), next(snapshot.rglob("*.safetensors")))
    assert preflight("mine", hub()) == SIZE
    assert architecture("mine", {"mine": hub()}).inputs["sample"] == (1, *SIZE)
    assert source_digest(hub()) == COMMIT


def test_a_pinned_source_is_one_string(tmp_path: Path, cache: Path) -> None:
    """What a job and a registered version say about their base model, and what loads it again."""
    in_the_hubs_cache(ddpm(tmp_path / "model"), cache)
    assert pinned_source(hub()) == f"{REPOSITORY}@{COMMIT}"
    assert pinned_source(ModelSettings(source="testbed:faces")) == "testbed:faces"
    assert preflight("mine", ModelSettings(source=pinned_source(hub()))) == SIZE


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (REPOSITORY, "no revision is set: .* commit"),
        (f"{REPOSITORY}@main", "'main' is no commit"),
        ("nowhere", "there is no folder nowhere"),
        ("/no/such/folder", "there is no folder /no/such/folder"),
        ("~/no/such/folder", "there is no folder /"),
        (f"{REPOSITORY}@{'f' * 40}", f"{REPOSITORY} is not in the cache, and .*hf download {REPOSITORY}"),
    ],
)
def test_what_cannot_be_found_or_could_move_is_refused(source: str, says: str, cache: Path) -> None:
    for ask in (lambda settings: preflight("test", settings), lambda settings: load_model(settings, SIZE)):
        with pytest.raises(InputError, match=says):
            ask(ModelSettings(source=source))


@pytest.mark.parametrize(
    ("kind", "offline", "says"),
    [
        (GatedRepoError, False, f"access to {REPOSITORY} is gated: accept its terms at .*HF_TOKEN"),
        (RepositoryNotFoundError, False, f"the hub has no {REPOSITORY}, or HF_TOKEN may not read it"),
        (RevisionNotFoundError, False, f"{REPOSITORY} has no commit {COMMIT}.*git ls-remote"),
        (None, True, "HF_HUB_OFFLINE forbids to ask the hub: unset it, or fetch .*hf download"),
        (None, False, "is not in the cache, and the hub does not answer: check the network"),
    ],
)
def test_a_hub_that_gives_nothing_says_why(
    kind: type[HfHubHTTPError] | None, offline: bool, says: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the hub's client raises them: a refusal as it is, or wrapped in "not in the cache"."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)

    def download(repository: str, *, local_files_only: bool = False, **asked: object) -> str:
        if local_files_only or kind is None:
            raise LocalEntryNotFoundError("not there")
        refused = kind("no", response=httpx2.Response(403, request=httpx2.Request("GET", "https://huggingface.co")))
        raise LocalEntryNotFoundError("not there") from refused

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(InputError, match=says):
        preflight("mine", hub())


def test_a_single_file_is_no_pipeline(tmp_path: Path) -> None:
    file = tmp_path / "sd3.safetensors"
    file.touch()
    with pytest.raises(InputError, match=r"is a single file: .*from_single_file"):
        preflight("mine", ModelSettings(source=str(file)))


@pytest.mark.parametrize("revision", ["main", "0123456", COMMIT.upper(), f"{COMMIT}\n"])
def test_a_revision_is_a_commit(revision: str) -> None:
    with pytest.raises(ValueError, match="revision"):
        ModelSettings(source=REPOSITORY, revision=revision)


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no revision"):
        preflight("test", ModelSettings(source=str(ddpm(tmp_path / "model")), revision=COMMIT))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_no_more_is_fetched_than_is_needed(
    variant: str | None, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = sd3(tmp_path / "remote")
    if variant:
        as_variant(remote, variant)
    else:
        shutil.copy(
            remote / "vae/diffusion_pytorch_model.safetensors", remote / "vae/diffusion_pytorch_model.fp16.safetensors"
        )
    for extra in ("sd3_all_in_one.safetensors", "text_encoders/t5.safetensors", "vae/diffusion_pytorch_model.bin"):
        (remote / extra).parent.mkdir(exist_ok=True)
        (remote / extra).touch()
    snapshot = cache / f"models--{REPOSITORY.replace('/', '--')}" / "snapshots" / COMMIT

    def download(
        repository: str,
        *,
        revision: str,
        local_files_only: bool = False,
        allow_patterns: Sequence[str] = (),
        ignore_patterns: Sequence[str] = (),
    ) -> str:
        assert (repository, revision) == (REPOSITORY, COMMIT)
        if local_files_only and not snapshot.exists():
            raise LocalEntryNotFoundError("not there")
        for path in [] if local_files_only else remote.rglob("*"):
            name = str(path.relative_to(remote))
            matches = [any(fnmatch.fnmatch(name, p) for p in ps) for ps in (allow_patterns, ignore_patterns)]
            if path.is_file() and matches == [True, False]:
                (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, snapshot / name)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    options = hub().model_copy(update={"prompt_tokens": 1})
    assert preflight("mine", options) == (48, 48)
    for _ in range(2):
        assert deep_preflight("mine", options, tmp_path / "cache", fetch=False) == (48, 48)
    assert not list(snapshot.rglob("*.safetensors")), "a look at the configs fetches no weights"
    deep_preflight("mine", options, tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    load_model(options, (32, 48))
    end = f".{variant}.safetensors" if variant else ".safetensors"
    fetched = sorted(str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if path.suffix != ".json")
    networks = ("transformer", "vae"), ("text_encoder", "text_encoder_2")
    files = [f"{n}/{s}{end}" for s, ns in zip(("diffusion_pytorch_model", "model"), networks, strict=True) for n in ns]
    assert [name for name in fetched if "." in Path(name).name] == sorted(files)


def test_a_digest_follows_weights_and_configs_alone(tmp_path: Path) -> None:
    first, copy, other = (ddpm(tmp_path / name) for name in ("first", "copy", "other"))
    weights = other / f"{UNET}.safetensors"
    save_file({name: value * 1.01 for name, value in load_file(weights).items()}, weights)
    digests = [source_digest(ModelSettings(source=str(folder))) for folder in (first, copy, other)]
    assert digests[0] == digests[1] != digests[2], "another training has weights of the same size"
    config = first / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("0.02", "0.03"))
    assert source_digest(ModelSettings(source=str(first))) != digests[0]


@pytest.mark.parametrize("damaged", ["model_index.json", "unet/config.json"])
def test_a_damaged_config_is_named(damaged: str, tmp_path: Path) -> None:
    folder = ddpm(tmp_path / "model")
    (folder / damaged).write_text("{")
    with pytest.raises(InputError, match=rf"{damaged} cannot be read \(JSONDecodeError\)"):
        preflight("test", ModelSettings(source=str(folder)))


@pytest.mark.parametrize("name", ["birds", "", "../models/faces", "."])
def test_testbed_names_are_names(name: str) -> None:
    with pytest.raises(InputError, match="no testbed model"):
        resolve_source(f"testbed:{name}")
