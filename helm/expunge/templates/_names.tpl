{{/* At most 23 characters: KubeRay takes 47 for a RayJob, and a batch's id and an attempt need 24 of them. */}}
{{- define "expunge.fullname" -}}
{{- $chart := default .Chart.Name .Values.nameOverride -}}
{{- $name := default (ternary .Release.Name (printf "%s-%s" .Release.Name $chart) (contains $chart .Release.Name)) .Values.fullnameOverride -}}
{{- $name = ternary (printf "x-%s" $name) $name (regexMatch "^[0-9]" $name) -}}
{{- $name = replace "." "-" $name -}}
{{- if gt (len $name) 23 -}}
{{- $name = printf "%s-%s" (trunc 16 $name | trimSuffix "-") (sha256sum $name | trunc 6) -}}
{{- end -}}
{{- $name -}}
{{- end }}

{{/* The labels that select this release's pods. They must never change: a Deployment's selector is immutable. */}}
{{- define "expunge.selector" -}}
app.kubernetes.io/part-of: expunge
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "expunge.labels" -}}
{{ include "expunge.selector" . }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "expunge.image" -}}
{{- $tag := default .Chart.AppVersion .Values.image.tag -}}
{{- .Values.image.repository }}{{ if .Values.image.digest }}@{{ .Values.image.digest }}{{ else }}:{{ $tag }}{{ end -}}
{{- end }}

{{- define "expunge.rayImage" -}}
{{- $own := .Values.ray.image -}}
{{- if or $own.repository $own.tag $own.digest -}}
{{- $tag := coalesce $own.tag .Values.image.tag .Chart.AppVersion -}}
{{- default .Values.image.repository $own.repository }}{{ if $own.digest }}@{{ $own.digest }}{{ else }}:{{ $tag }}{{ end -}}
{{- else -}}
{{- include "expunge.image" . -}}
{{- end -}}
{{- end }}

{{- define "expunge.home.claim" -}}
{{- default (printf "%s-home" (include "expunge.fullname" .)) .Values.home.existingClaim -}}
{{- end }}

{{- define "expunge.models.claim" -}}
{{- default (printf "%s-models" (include "expunge.fullname" .)) .Values.modelCache.existingClaim -}}
{{- end }}

{{- define "expunge.mlflow.name" -}}
{{ include "expunge.fullname" . }}-mlflow
{{- end }}

{{- define "expunge.mlflow.url" -}}
{{- if .Values.mlflow.enabled -}}
http://{{ include "expunge.mlflow.name" . }}:5000
{{- else -}}
{{ .Values.mlflow.externalUrl }}
{{- end -}}
{{- end }}

{{/* True if MLflow keeps anything on a volume of its own. */}}
{{- define "expunge.mlflow.local" -}}
{{- if or (not .Values.mlflow.database.existingSecret) (not .Values.mlflow.artifacts.destination) -}}true{{- end -}}
{{- end }}

{{/* How many seconds a night may take with all its retries and KubeRay's own overhead. */}}
{{- define "expunge.deadline" -}}
{{- $once := add (int .Values.rayJob.activeDeadlineSeconds) (int .Values.rayJob.preRunningDeadlineSeconds) -}}
{{- add 900 (mul $once (add 1 (int .Values.rayJob.backoffLimit))) -}}
{{- end }}

{{/* A quantity of memory in bytes. */}}
{{- define "expunge.bytes" -}}
{{- $units := dict "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 "k" 1000 "M" 1000000 "G" 1000000000 "T" 1000000000000 "" 1 -}}
{{- $text := toString . -}}
{{- mulf (regexFind "^[0-9.]+" $text | float64) (get $units (regexFind "[A-Za-z]*$" $text) | float64) | int64 -}}
{{- end }}
