{{/* A pod selector: all of the release's pods, those of some components, or one of Ray's roles. */}}
{{- define "expunge.pods" -}}
matchLabels:
  {{- include "expunge.selector" .root | nindent 2 }}
  {{- with .ray }}
  expunge/ray: {{ . }}
  {{- end }}
{{- with .pods }}
matchExpressions:
  - {key: app.kubernetes.io/component, operator: In, values: {{ toJson . }}}
{{- end }}
{{- end }}

{{/* The head of a NetworkPolicy; its rules follow. */}}
{{- define "expunge.policy" -}}
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: {{ include "expunge.fullname" .root }}-{{ .hole }}
  labels:
    {{- include "expunge.labels" .root | nindent 4 }}
spec:
  podSelector:
    {{- include "expunge.pods" . | nindent 4 }}
  policyTypes: {{ toJson .types }}
{{- end }}

{{/* One rule: these peers on these ports. Without peers, any address may use these ports. */}}
{{- define "expunge.hole" -}}
ports:
  {{- range .ports }}
  - {protocol: TCP, port: {{ int . }}}
  {{- end }}
{{- with .peers }}
{{ $.direction }}: {{ toJson . }}
{{- end }}
{{- end }}
