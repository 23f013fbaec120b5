{{/* Name of everything that belongs to a release. */}}
{{- define "ruvector-proxy.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" }}
{{- end }}

{{- define "ruvector-proxy.selector" -}}
app.kubernetes.io/name: ruvector-proxy
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "ruvector-proxy.labels" -}}
{{ include "ruvector-proxy.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{/* Seconds from "stop" to the end of the pod's endpoints, before the proxy refuses new clients. */}}
{{- define "ruvector-proxy.preStop" -}}5{{- end }}

{{/* preStop + drain + 5 s for workers that hang + 10 s for the learner + 5 s to spare. */}}
{{- define "ruvector-proxy.grace" -}}
{{- add (include "ruvector-proxy.preStop" . | int) (ceil .Values.drainTimeout) 20 }}
{{- end }}
