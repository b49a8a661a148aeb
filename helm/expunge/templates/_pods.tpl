{{/* The restricted profile of Kubernetes' pod security standards, and a root file system that nothing writes to. */}}
{{- define "expunge.podSecurity" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "expunge.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities: {drop: [ALL]}
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "expunge.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* Requests equal limits, so that a night is not evicted for using what it asked for. Takes {cpu, memory, gpu} and the GPUs' name. */}}
{{- define "expunge.resources" -}}
{{- $amounts := dict "cpu" (toString .amounts.cpu) "memory" (toString .amounts.memory) -}}
{{- if .amounts.gpu -}}{{- $_ := set $amounts .gpuResource (toString .amounts.gpu) -}}{{- end -}}
requests: {{ toJson $amounts }}
limits: {{ toJson $amounts }}
{{- end }}

{{/* Secrets by reference only: pod specs and Ray's dashboard show values in clear. Service links would add EXPUNGE_*, too. */}}
{{- define "expunge.env" -}}
- {name: EXPUNGE_HOME, value: /var/lib/expunge}
- {name: EXPUNGE_CONFIG, value: /etc/expunge/config.toml}
- {name: EXPUNGE_TRACKING_URI, value: {{ include "expunge.mlflow.url" . | quote }}}
{{- with .Values.database.existingSecret }}
- name: EXPUNGE_DATABASE_URL
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.database.key }}}}
{{- end }}
{{- with .Values.blobs.url }}
- {name: EXPUNGE_BLOB_URL, value: {{ . | quote }}}
{{- end }}
{{- with .Values.blobs.sealingKey.existingSecret }}
- name: EXPUNGE_BLOB_KEY
  valueFrom: {secretKeyRef: {name: {{ . }}, key: {{ $.Values.blobs.sealingKey.key }}}}
{{- end }}
{{- include "expunge.objectStoreEnv" . }}
{{- include "expunge.plainEnv" . }}
{{- end }}

{{- define "expunge.objectStoreEnv" -}}
{{- with .Values.objectStore.existingSecret }}
{{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" }}
- name: {{ . }}
  valueFrom: {secretKeyRef: {name: {{ $.Values.objectStore.existingSecret }}, key: {{ . }}}}
{{- end }}
{{- end }}
{{- with .Values.objectStore.endpointUrl }}
- {name: AWS_ENDPOINT_URL, value: {{ . | quote }}}
- {name: MLFLOW_S3_ENDPOINT_URL, value: {{ . | quote }}}
{{- end }}
{{- with .Values.objectStore.region }}
- {name: AWS_DEFAULT_REGION, value: {{ . | quote }}}
{{- end }}
{{- end }}

{{- define "expunge.plainEnv" }}
- {name: HOME, value: /tmp/home}
- {name: TRITON_CACHE_DIR, value: /tmp/triton}
- {name: MPLCONFIGDIR, value: /tmp/matplotlib}
- {name: DO_NOT_TRACK, value: "true"}
- {name: MLFLOW_DISABLE_TELEMETRY, value: "true"}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
- {name: DS_BUILD_OPS, value: "0"}
{{- if and .Values.networkPolicy.enabled (not .Values.networkPolicy.modelHub.enabled) }}
- {name: HF_HUB_OFFLINE, value: "1"}
{{- end }}
{{- end }}

{{- define "expunge.mounts" -}}
- {name: home, mountPath: /var/lib/expunge}
- {name: config, mountPath: /etc/expunge, readOnly: true}
- {name: scratch, mountPath: /tmp}
{{- end }}

{{- define "expunge.volumes" -}}
- name: home
  persistentVolumeClaim: {claimName: {{ include "expunge.home.claim" . }}}
- name: config
  configMap: {name: {{ include "expunge.fullname" . }}-config}
{{- end }}

{{/* The trigger's arguments, which `helm test` also uses after making its request. */}}
{{- define "expunge.triggerArguments" -}}
- --template=/etc/expunge/rayjob.json
- --prefix={{ include "expunge.fullname" . }}
- --namespace={{ .Release.Namespace }}
- --night=$(NIGHT)
- --deadline={{ include "expunge.deadline" . }}
- --patience={{ int .Values.trigger.patienceSeconds }}
- --poll={{ int .Values.trigger.pollSeconds }}
{{- end }}
