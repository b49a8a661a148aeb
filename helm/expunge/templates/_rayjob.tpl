{{/* One night as a RayJobSpec: the CronJob's trigger creates it from a ConfigMap, the RayCronJob has it inline. */}}
{{- define "expunge.rayJobSpec" -}}
{{- $job := .Values.rayJob -}}
entrypoint: python -m expunge.jobs.nightly
submissionMode: {{ $job.submissionMode }}
backoffLimit: {{ int $job.backoffLimit }}
activeDeadlineSeconds: {{ int $job.activeDeadlineSeconds }}
preRunningDeadlineSeconds: {{ int $job.preRunningDeadlineSeconds }}
suspend: {{ $job.suspend }}
{{- if $job.deletionRules }}
deletionStrategy:
  deletionRules:
    {{- toYaml $job.deletionRules | nindent 4 }}
{{- else }}
shutdownAfterJobFinishes: {{ $job.shutdownAfterJobFinishes }}
ttlSecondsAfterFinished: {{ int $job.ttlSecondsAfterFinished }}
{{- end }}
{{- if eq $job.submissionMode "K8sJobMode" }}
{{- if not (kindIs "invalid" $job.submitterBackoffLimit) }}
submitterConfig: {backoffLimit: {{ int $job.submitterBackoffLimit }}}
{{- end }}
submitterPodTemplate:
  {{- include "expunge.submitterPod" . | nindent 2 }}
{{- end }}
rayClusterSpec:
  rayVersion: {{ .Values.ray.version | quote }}
  authOptions:
    mode: token
    {{- with .Values.ray.auth.existingSecret }}
    secretName: {{ . }}
    {{- end }}
  enableInTreeAutoscaling: {{ .Values.ray.autoscaling.enabled }}
  {{- with .Values.ray.autoscaling }}
  {{- if .enabled }}
  autoscalerOptions:
    version: {{ .version }}
    upscalingMode: {{ .upscalingMode }}
    idleTimeoutSeconds: {{ int .idleTimeoutSeconds }}
    resources:
      {{- include "expunge.resources" (dict "amounts" .resources "gpuResource" "") | nindent 6 }}
    securityContext:
      {{- include "expunge.containerSecurity" $ | nindent 6 }}
  {{- end }}
  {{- end }}
  headGroupSpec:
    rayStartParams:
      dashboard-host: 0.0.0.0
      {{- if .Values.ray.workers }}
      num-cpus: "0"
      {{- end }}
      {{- range $name, $value := .Values.ray.head.rayStartParams }}
      {{ $name }}: {{ toString $value | quote }}
      {{- end }}
    template:
      {{- include "expunge.rayPod" (dict "root" . "node" .Values.ray.head "name" "head" "group" "head") | nindent 6 }}
  {{- if .Values.ray.workers }}
  workerGroupSpecs:
    {{- range .Values.ray.workers }}
    - groupName: {{ .name }}
      replicas: {{ int .replicas }}
      minReplicas: {{ int .minReplicas }}
      maxReplicas: {{ int .maxReplicas }}
      rayStartParams:
        {{- range $name, $value := .rayStartParams }}
        {{ $name }}: {{ toString $value | quote }}
        {{- else }} {}
        {{- end }}
      template:
        {{- include "expunge.rayPod" (dict "root" $ "node" . "name" "worker" "group" .name) | nindent 8 }}
    {{- end }}
  {{- end }}
{{- end }}

{{/* The pod of a head or a worker. KubeRay adds the command that starts Ray, its token and its probes. */}}
{{- define "expunge.rayPod" -}}
{{- $root := .root -}}
metadata:
  labels:
    {{- include "expunge.selector" $root | nindent 4 }}
    app.kubernetes.io/component: ray
    expunge/ray: {{ .name }}
spec:
  serviceAccountName: {{ include "expunge.fullname" $root }}-ray
  # The autoscaler, next to the head, is the only part of Ray that talks to the API server.
  automountServiceAccountToken: {{ and (eq .name "head") $root.Values.ray.autoscaling.enabled }}
  enableServiceLinks: false
  {{- include "expunge.pullSecrets" $root | nindent 2 }}
  {{- with .node.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with .node.nodeSelector }}
  nodeSelector: {{ toJson . }}
  {{- end }}
  {{- with .node.tolerations }}
  tolerations: {{ toJson . }}
  {{- end }}
  {{- with .node.spreadOver }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: {{ ternary "kubernetes.io/hostname" "topology.kubernetes.io/zone" (eq . "hostname") }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "expunge.selector" $root | nindent 10 }}
          ray.io/group: {{ $.group }}
  {{- end }}
  securityContext:
    {{- include "expunge.podSecurity" $root | nindent 4 }}
  containers:
    - name: ray-{{ .name }}
      image: {{ include "expunge.rayImage" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        {{- include "expunge.containerSecurity" $root | nindent 8 }}
      ports:
        {{- if eq .name "head" }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        {{- end }}
        - {name: metrics, containerPort: 8080}
      env:
        {{- include "expunge.env" $root | nindent 8 }}
        {{- range $name, $value := $root.Values.ray.env }}
        - {name: {{ $name }}, value: {{ toString $value | quote }}}
        {{- end }}
      resources:
        {{- include "expunge.resources" (dict "amounts" .node.resources "gpuResource" $root.Values.ray.gpuResource) | nindent 8 }}
      volumeMounts:
        {{- include "expunge.mounts" $root | nindent 8 }}
        - {name: shared-memory, mountPath: /dev/shm}
        {{- if $root.Values.modelCache.enabled }}
        - {name: models, mountPath: /models, readOnly: true}
        {{- end }}
  volumes:
    {{- include "expunge.volumes" $root | nindent 4 }}
    - name: scratch
      emptyDir: {sizeLimit: {{ $root.Values.ray.scratch }}}
    - name: shared-memory
      emptyDir: {medium: Memory, sizeLimit: {{ .node.sharedMemory }}}
    {{- if $root.Values.modelCache.enabled }}
    - name: models
      persistentVolumeClaim: {claimName: {{ include "expunge.models.claim" $root }}, readOnly: true}
    {{- end }}
{{- end }}

{{/* The pod that runs `ray job submit`. KubeRay's default would not be admitted to a restricted namespace. */}}
{{- define "expunge.submitterPod" -}}
metadata:
  labels:
    {{- include "expunge.selector" . | nindent 4 }}
    app.kubernetes.io/component: ray
    expunge/ray: submitter
spec:
  restartPolicy: Never
  serviceAccountName: {{ include "expunge.fullname" . }}-ray
  automountServiceAccountToken: false
  enableServiceLinks: false
  {{- include "expunge.pullSecrets" . | nindent 2 }}
  securityContext:
    {{- include "expunge.podSecurity" . | nindent 4 }}
  containers:
    - name: ray-job-submitter
      image: {{ include "expunge.rayImage" . }}
      imagePullPolicy: {{ .Values.image.pullPolicy }}
      securityContext:
        {{- include "expunge.containerSecurity" . | nindent 8 }}
      env:
        {{- include "expunge.plainEnv" . | nindent 8 }}
      resources:
        {{- include "expunge.resources" (dict "amounts" (dict "cpu" "500m" "memory" "1Gi") "gpuResource" "") | nindent 8 }}
      volumeMounts:
        - {name: scratch, mountPath: /tmp}
  volumes:
    - name: scratch
      emptyDir: {sizeLimit: 1Gi}
{{- end }}
