{{/* Checks that values.schema.json cannot express. All problems are reported at once, each with what to write instead. */}}
{{- define "expunge.validate" -}}
{{- $problems := list -}}
{{- range $part := list "names" "production" "storage" "trigger" "rayjob" "ray" "mlflow" "secrets" -}}
{{- range include (printf "expunge.validate.%s" $part) $ | splitList "\n" -}}
{{- with trim . -}}{{- $problems = append $problems . -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- with $problems -}}
{{- fail (printf "\n\nvalues of %s are refused:\n- %s\n" $.Release.Name (join "\n- " .)) -}}
{{- end -}}
{{- end }}

{{- define "expunge.validate.names" -}}
{{- $label := "^[a-z]([-a-z0-9]*[a-z0-9])?$" -}}
{{- with .Values.fullnameOverride }}
{{- if or (gt (len .) 23) (not (regexMatch $label .)) }}
fullnameOverride: {{ . | quote }} names RayJobs, and KubeRay takes 47 characters; write at most 23 of a-z, 0-9 and dash, a letter first
{{- end }}
{{- end }}
{{- range $where, $image := dict "image" .Values.image "ray.image" .Values.ray.image }}
{{- if eq $image.tag "latest" }}
{{ $where }}.tag: "latest" may be a different image for each pod; write a version, or {{ $where }}.digest
{{- end }}
{{- if and $image.digest (not (regexMatch "^sha256:[0-9a-f]{64}$" $image.digest)) }}
{{ $where }}.digest: {{ $image.digest | quote }} is not a digest; write sha256: and 64 hex digits
{{- end }}
{{- if contains "@" $image.repository }}
{{ $where }}.repository: {{ $image.repository | quote }} contains a digest; move it to {{ $where }}.digest
{{- end }}
{{- end }}
{{- end }}

{{- define "expunge.validate.production" -}}
{{- if eq .Values.profile "production" }}
{{- $hint := "(or profile: dev, if the data is nobody's)" }}
{{- if not .Values.database.existingSecret }}
database.existingSecret: production keeps requests in PostgreSQL; name a Secret that holds its URL {{ $hint }}
{{- end }}
{{- if not .Values.blobs.url }}
blobs.url: production keeps sealed images in an object store; write s3://BUCKET/PREFIX {{ $hint }}
{{- end }}
{{- if not .Values.blobs.sealingKey.existingSecret }}
blobs.sealingKey.existingSecret: the sealing key must not lie beside what it seals; name a Secret with `openssl rand -base64 32` {{ $hint }}
{{- end }}
{{- if .Values.mlflow.enabled }}
{{- if not .Values.mlflow.database.existingSecret }}
mlflow.database.existingSecret: production keeps the registry in PostgreSQL; name a Secret that holds its URL, or set mlflow.enabled: false and mlflow.externalUrl {{ $hint }}
{{- end }}
{{- if not .Values.mlflow.artifacts.destination }}
mlflow.artifacts.destination: production keeps hotfixes in an object store; write s3://BUCKET/PREFIX {{ $hint }}
{{- end }}
{{- end }}
{{- if not .Values.networkPolicy.enabled }}
networkPolicy.enabled: MLflow has no password and Ray no encryption; leave it true and name the holes {{ $hint }}
{{- end }}
{{- end }}
{{- end }}

{{- define "expunge.validate.storage" -}}
{{- if and .Values.ray.workers (not .Values.home.existingClaim) (ne .Values.home.accessMode "ReadWriteMany") }}
home.accessMode: {{ .Values.home.accessMode }} cannot be mounted by Ray pods on several nodes; write ReadWriteMany, or ray.workers: []
{{- end }}
{{- range $name, $size := dict "home.size" .Values.home.size "modelCache.size" .Values.modelCache.size "ray.scratch" .Values.ray.scratch "mlflow.persistence.size" .Values.mlflow.persistence.size }}
{{- if not (regexMatch "^[0-9]+(\\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$" $size) }}
{{ $name }}: {{ $size | quote }} is not a quantity; write e.g. 100Gi
{{- end }}
{{- end }}
{{- with .Values.blobs.url }}
{{- if not (regexMatch "^[a-z0-9+]+://" .) }}
blobs.url: {{ . | quote }} is a path inside a pod, and lost with the pod; write s3://BUCKET/PREFIX, or leave it empty for a folder of the home
{{- end }}
{{- end }}
{{- with .Values.mlflow.artifacts.destination }}
{{- if not (regexMatch "^[a-z0-9+]+://" .) }}
mlflow.artifacts.destination: {{ . | quote }} is a path in a pod; write s3://BUCKET/PREFIX, or leave it empty for a volume
{{- end }}
{{- end }}
{{- with .Values.objectStore.endpointUrl }}
{{- if not (regexMatch "^https?://" .) }}
objectStore.endpointUrl: {{ . | quote }} is not a URL; write e.g. https://minio.storage.svc:9000
{{- end }}
{{- end }}
{{- end }}

{{- define "expunge.validate.trigger" -}}
{{- $trigger := .Values.trigger -}}
{{- if hasPrefix "TZ=" $trigger.schedule | or (hasPrefix "CRON_TZ=" $trigger.schedule) }}
trigger.schedule: Kubernetes refuses a time zone in the schedule; write it to trigger.timeZone
{{- else if not (regexMatch "^(\\S+\\s+){4}\\S+$" $trigger.schedule | or (regexMatch "^@(hourly|daily|midnight|weekly|monthly)$" $trigger.schedule)) }}
trigger.schedule: {{ $trigger.schedule | quote }} is not cron; write five fields, e.g. "0 1 * * *" for one o'clock each night
{{- end }}
{{- if not (regexMatch "^[A-Za-z]+(/[A-Za-z0-9_+-]+)*$" $trigger.timeZone) | or (eq $trigger.timeZone "Local") }}
trigger.timeZone: {{ $trigger.timeZone | quote }} is not in the time zone database; write e.g. Etc/UTC or Europe/Berlin
{{- end }}
{{- if lt (int $trigger.startingDeadlineSeconds) 10 }}
trigger.startingDeadlineSeconds: Kubernetes checks every 10 s, so with less no night ever starts; write 600 or more
{{- end }}
{{- if and (eq $trigger.kind "RayCronJob") (not (.Capabilities.APIVersions.Has "ray.io/v1/RayCronJob")) }}
trigger.kind: this cluster does not know RayCronJob (ray.io/v1); write CronJob, or install KubeRay 1.7 with its RayCronJob definition and gate
{{- end }}
{{- if and (eq $trigger.kind "RayCronJob") .Values.kueue.queue }}
trigger.kind: the RayJobs of a RayCronJob do not get Kueue's labels from here; write CronJob, or leave kueue.queue empty
{{- end }}
{{- range $trigger.models }}
{{- if not (regexMatch "^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$" .) }}
trigger.models: {{ . | quote }} is not a model's name; write those of config.models
{{- end }}
{{- end }}
{{- end }}

{{- define "expunge.validate.rayjob" -}}
{{- $job := .Values.rayJob -}}
{{- if $job.deletionRules }}
{{- if $job.shutdownAfterJobFinishes }}
rayJob.deletionRules: KubeRay refuses them together with shutdownAfterJobFinishes; write rayJob.shutdownAfterJobFinishes: false, or no rules
{{- end }}
{{- if int $job.ttlSecondsAfterFinished }}
rayJob.deletionRules: KubeRay refuses them together with ttlSecondsAfterFinished; write rayJob.ttlSecondsAfterFinished: 0 and a rule's condition.ttlSeconds
{{- end }}
{{- else if not $job.shutdownAfterJobFinishes }}
{{- if int $job.ttlSecondsAfterFinished }}
rayJob.ttlSecondsAfterFinished: KubeRay refuses it without shutdownAfterJobFinishes; write rayJob.shutdownAfterJobFinishes: true
{{- end }}
{{- if not .Values.kueue.queue }}
rayJob.shutdownAfterJobFinishes: without it the night's GPUs are held forever; write true, or rayJob.deletionRules
{{- end }}
{{- end }}
{{- if and $job.suspend (not $job.shutdownAfterJobFinishes) }}
rayJob.suspend: KubeRay refuses it without shutdownAfterJobFinishes; write rayJob.shutdownAfterJobFinishes: true
{{- end }}
{{- if eq $job.submissionMode "InteractiveMode" }}
rayJob.submissionMode: InteractiveMode waits for a person to submit; write K8sJobMode, HTTPMode or SidecarMode
{{- end }}
{{- if and (ne $job.submissionMode "K8sJobMode") (not (kindIs "invalid" $job.submitterBackoffLimit)) }}
rayJob.submitterBackoffLimit: {{ $job.submissionMode }} has no submitter, and KubeRay refuses settings for one; write null, or submissionMode: K8sJobMode
{{- end }}
{{- if ge (int $job.preRunningDeadlineSeconds) (int $job.activeDeadlineSeconds) }}
rayJob.preRunningDeadlineSeconds: the night's deadline would come before its cluster's; write less than rayJob.activeDeadlineSeconds ({{ int $job.activeDeadlineSeconds }})
{{- end }}
{{- if .Values.kueue.queue }}
{{- if not $job.shutdownAfterJobFinishes }}
kueue.queue: Kueue takes only RayJobs that delete their cluster; write rayJob.shutdownAfterJobFinishes: true
{{- end }}
{{- if .Values.ray.autoscaling.enabled }}
kueue.queue: Kueue admits a night of a fixed size; write ray.autoscaling.enabled: false
{{- end }}
{{- if $job.suspend }}
rayJob.suspend: Kueue suspends and resumes by itself; write false
{{- end }}
{{- else if .Values.kueue.priorityClass }}
kueue.priorityClass: it has no effect without a queue; write kueue.queue
{{- end }}
{{- end }}

{{- define "expunge.validate.ray" -}}
{{- $ray := .Values.ray -}}
{{- if not (regexMatch "^[0-9]+\\.[0-9]+\\.[0-9]+$" $ray.version) }}
ray.version: {{ $ray.version | quote }} is not a release; write the one in the image, e.g. 2.60.0
{{- else if semverCompare "<2.52.0" $ray.version }}
ray.version: {{ $ray.version }} has no token authentication, so anyone who reaches the head runs code; write 2.52.0 or newer, and build the image with it
{{- end }}
{{- $reserved := "^(num-cpus|num-gpus|memory|resources|object-store-memory)$" -}}
{{- range $name, $value := $ray.head.rayStartParams }}
{{- if regexMatch $reserved $name }}
ray.head.rayStartParams: {{ $name }} is derived from the pod's resources; write ray.head.resources
{{- end }}
{{- end }}
{{- range $nodes := concat (list (merge (dict "where" "ray.head") $ray.head)) $ray.workers }}
{{- $where := default (printf "ray.workers[%s]" $nodes.name) $nodes.where }}
{{- $quantity := "^[0-9]+(\\.[0-9]+)?(Ki|Mi|Gi|Ti|k|M|G|T)?$" }}
{{- $memory := toString $nodes.resources.memory }}
{{- if not (and (regexMatch $quantity $memory) (regexMatch $quantity $nodes.sharedMemory)) }}
{{ $where }}: memory {{ $memory | quote }} or sharedMemory {{ $nodes.sharedMemory | quote }} is not a quantity; write e.g. 64Gi
{{- else if ge (include "expunge.bytes" $nodes.sharedMemory | int64) (include "expunge.bytes" $memory | int64) }}
{{ $where }}.sharedMemory: {{ $nodes.sharedMemory }} uses up the memory limit {{ $memory }}, which it counts against; write about a quarter of that
{{- end }}
{{- end }}
{{- $seen := list }}
{{- range $ray.workers }}
{{- if not (regexMatch "^[a-z]([-a-z0-9]{0,18}[a-z0-9])?$" .name) }}
ray.workers: group {{ .name | quote }} names pods; write at most 20 of a-z, 0-9 and dash, a letter first
{{- end }}
{{- if has .name $seen }}
ray.workers: two groups are called {{ .name }}; give each a name of its own
{{- end }}
{{- $seen = append $seen .name }}
{{- if or (lt (int .replicas) (int .minReplicas)) (gt (int .replicas) (int .maxReplicas)) }}
ray.workers[{{ .name }}].replicas: {{ int .replicas }} is not within minReplicas {{ int .minReplicas }} and maxReplicas {{ int .maxReplicas }}; write numbers in that order
{{- end }}
{{- if not (has (default "" .spreadOver) (list "" "hostname" "zone")) }}
ray.workers[{{ .name }}].spreadOver: {{ .spreadOver | quote }} is unknown; write hostname, zone, or nothing
{{- end }}
{{- range $name, $value := .rayStartParams }}
{{- if regexMatch $reserved $name }}
ray.workers: rayStartParams.{{ $name }} is derived from the pod's resources; write resources
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{- define "expunge.validate.mlflow" -}}
{{- $mlflow := .Values.mlflow -}}
{{- if and $mlflow.enabled $mlflow.externalUrl }}
mlflow.externalUrl: the chart also runs a server, and a night can use only one; write mlflow.enabled: false, or no URL
{{- end }}
{{- if not (or $mlflow.enabled $mlflow.externalUrl) }}
mlflow.externalUrl: a night needs a tracking server and registry; write its URL, or mlflow.enabled: true
{{- end }}
{{- with $mlflow.externalUrl }}
{{- if not (regexMatch "^https?://[^/]+" .) }}
mlflow.externalUrl: {{ . | quote }} is not a server's URL; write e.g. https://mlflow.example.org
{{- end }}
{{- end }}
{{- if and $mlflow.enabled (gt (int $mlflow.replicas) 1) (include "expunge.mlflow.local" .) }}
mlflow.replicas: several servers cannot share SQLite or a volume; write 1, or name mlflow.database.existingSecret and mlflow.artifacts.destination
{{- end }}
{{- range $mlflow.allowedHosts }}
{{- if contains "*" . }}
mlflow.allowedHosts: {{ . | quote }} opens the server to DNS rebinding; write the host names that it is reached by
{{- end }}
{{- end }}
{{- end }}

{{- define "expunge.validate.secrets" -}}
{{- range $name, $url := dict "blobs.url" .Values.blobs.url "mlflow.externalUrl" .Values.mlflow.externalUrl "mlflow.artifacts.destination" .Values.mlflow.artifacts.destination "objectStore.endpointUrl" .Values.objectStore.endpointUrl }}
{{- if regexMatch "://[^/]*@" $url }}
{{ $name }}: it contains a user or a password, which everyone who can read the release sees; take them out and name an existingSecret
{{- end }}
{{- end }}
{{- range $name, $value := .Values.ray.env }}
{{- if hasPrefix "EXPUNGE_" $name }}
ray.env.{{ $name }}: settings reach the trigger and Ray through config.toml; write it to config
{{- else if regexMatch "(?i)(^|_)(password|secret|token|credentials?|private_key|access_key|api_?key)(_|$)" $name }}
ray.env.{{ $name }}: environments are shown in Ray's dashboard and in pod specs; keep it in a Secret, and name that as an existingSecret
{{- end }}
{{- end }}
{{- range $name := list "home" "config" "database_url" "blob_url" "blob_key" "tracking_uri" "ray_address" }}
{{- if hasKey $.Values.config $name }}
config.{{ $name }}: the chart sets it; write {{ get (dict "home" "home" "config" "config itself" "database_url" "database.existingSecret" "blob_url" "blobs.url" "blob_key" "blobs.sealingKey.existingSecret" "tracking_uri" "mlflow.externalUrl" "ray_address" "nothing: the night runs on its own Ray") $name }}
{{- end }}
{{- end }}
{{- if and .Values.tests.enabled (hasKey (default dict .Values.config.models) "helm-test") }}
config.models.helm-test: `helm test` uses that name; write another, or tests.enabled: false
{{- end }}
{{- end }}
