{{/* Names begin with the release's, which Helm limits to 53 characters. */}}
{{- define "suite.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
app.kubernetes.io/part-of: vllm-suite
{{ include "suite.selector" . }}
{{- end -}}

{{- define "suite.selector" -}}
app.kubernetes.io/name: vllm-suite
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- with .component }}
app.kubernetes.io/component: {{ . }}
{{- end }}
{{- end -}}

{{/* Pods that are instances of any role. */}}
{{- define "suite.instances" -}}
matchLabels:
  app.kubernetes.io/name: vllm-suite
  app.kubernetes.io/instance: {{ .Release.Name }}
matchExpressions:
  - key: app.kubernetes.io/component
    operator: In
    values: [encode, prefill, decode, any]
{{- end -}}

{{- define "suite.image" -}}
{{- $image := .image -}}
{{- if $image.digest -}}{{ $image.repository }}@{{ $image.digest }}
{{- else -}}{{ $image.repository }}:{{ default .root.Chart.AppVersion $image.tag }}{{- end -}}
{{- end -}}

{{- define "suite.secret" -}}
{{- default (printf "%s-keys" .Release.Name) .Values.kubernetes.keys.existing_secret -}}
{{- end -}}

{{/* "true" where the file asks for the controller of role switching. */}}
{{- define "suite.controls" -}}
{{- if dig "roles" "control" false (omit .Values.AsMap "kubernetes") -}}true{{- end -}}
{{- end -}}

{{/* "true" where clients need a key. */}}
{{- define "suite.clientKey" -}}
{{- if or .Values.kubernetes.keys.require_api_key .Values.kubernetes.keys.client_secret (dig "auth" "api_keys" list (default dict .Values.router)) -}}true{{- end -}}
{{- end -}}

{{/* Where routers find the keys of clients that have a Secret of their own. */}}
{{- define "suite.clientKeysFolder" -}}/etc/vllm-suite-api-keys{{- end -}}

{{- define "suite.podSecurity" -}}
runAsNonRoot: true
runAsUser: {{ int64 .Values.kubernetes.run_as }}
runAsGroup: {{ int64 .Values.kubernetes.run_as }}
fsGroup: {{ int64 .Values.kubernetes.run_as }}
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "suite.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "suite.keyEnv" -}}
- name: {{ .env }}
  valueFrom:
    secretKeyRef:
      name: {{ include "suite.secret" .root }}
      key: {{ .key }}
{{- end -}}

{{/* Where the collector of spans is let through; nothing without one. */}}
{{- define "suite.tracingPort" -}}
{{- with .Values.tracing -}}
  {{- $url := urlParse .endpoint -}}
  {{- $port := regexFind "[0-9]+$" (regexFind ":[0-9]+$" $url.host) | default (ternary "443" "80" (eq $url.scheme "https")) -}}
- ports:
    - {protocol: TCP, port: {{ $port }}}
{{- end -}}
{{- end -}}

{{/* Settings of a pod: a role's over the shared ones, key by key. */}}
{{- define "suite.podSettings" -}}
{{- $out := dict -}}
{{- range $key, $value := .shared -}}{{- if $value -}}{{- $_ := set $out $key $value -}}{{- end -}}{{- end -}}
{{- range $key, $value := .own -}}{{- if $value -}}
  {{- if and (eq $key "resources") (not (or $value.requests $value.limits)) -}}{{- else -}}{{- $_ := set $out $key $value -}}{{- end -}}
{{- end -}}{{- end -}}
{{ toJson $out }}
{{- end -}}

{{- define "suite.podPlaces" -}}
{{- $out := dict -}}
{{- with .node_selector -}}{{- $_ := set $out "nodeSelector" . -}}{{- end -}}
{{- with .tolerations -}}{{- $_ := set $out "tolerations" . -}}{{- end -}}
{{- with .priority_class -}}{{- $_ := set $out "priorityClassName" . -}}{{- end -}}
{{- with .runtime_class -}}{{- $_ := set $out "runtimeClassName" . -}}{{- end -}}
{{- if $out }}{{ toYaml $out }}{{ end -}}
{{- end -}}

{{- define "suite.pullSecrets" -}}
{{- range . }}
- name: {{ . }}
{{- end }}
{{- end -}}

{{/* The port of a data-parallel rank is the first one plus its index. */}}
{{- define "suite.width" -}}
{{- default 1 .data_parallel_size | int -}}
{{- end -}}

{{/* Roles that are there, as a JSON list of {role, pool, engine, nodes}. */}}
{{- define "suite.roles" -}}
{{- $root := . -}}
{{- $roles := list -}}
{{- range $role := list "encode" "prefill" "decode" "any" -}}
  {{- if hasKey $root.Values.pools $role -}}
  {{- $pool := get $root.Values.pools $role -}}
  {{- if not (kindIs "invalid" $pool) -}}
    {{- $engine := include "suite.engine" (dict "root" $root "pool" $pool) | fromJson -}}
    {{- $gpus := include "suite.gpus" $engine | int -}}
    {{- $per := int $root.Values.kubernetes.gpus_per_node -}}
    {{- $nodes := 1 -}}
    {{- if and (eq $root.Values.kubernetes.device "gpu") (gt $gpus $per) -}}
      {{- if mod $gpus $per -}}
        {{- fail (printf "pools.%s: %d GPUs do not fill nodes of %d (kubernetes.gpus_per_node)" $role $gpus $per) -}}
      {{- end -}}
      {{- if gt (int (default 1 $engine.data_parallel_size)) 1 -}}
        {{- fail (printf "pools.%s: an instance over several nodes has no data_parallel_size here; raise replicas" $role) -}}
      {{- end -}}
      {{- if and (has "epd" $root.Values.plugins) (has $role (list "encode" "any")) -}}
        {{- fail (printf "pools.%s: an instance that encodes has to fit on one node" $role) -}}
      {{- end -}}
      {{- $nodes = div $gpus $per -}}
    {{- end -}}
    {{- $roles = append $roles (dict "role" $role "pool" $pool "engine" $engine "nodes" $nodes "gpus" (div $gpus $nodes)) -}}
  {{- end -}}
  {{- end -}}
{{- end -}}
{{ toJson $roles }}
{{- end -}}

{{/* Milliseconds of "300ms", "1.5s", "2m", as vllm_suite/fleet/units.py reads them. */}}
{{- define "suite.milliseconds" -}}
{{- $units := dict "us" 0.001 "ms" 1.0 "s" 1000.0 "m" 60000.0 "h" 3600000.0 -}}
{{- mulf (float64 (regexFind "^[0-9.]+" (trim .))) (get $units (regexFind "[a-z]+$" (lower (trim .)))) -}}
{{- end -}}

{{/* The workload of pools.any whose size the controller sets, as its command line names it; empty without roles.scale. */}}
{{- define "suite.scaled" -}}
{{- if dig "roles" "scale" dict (omit .Values.AsMap "kubernetes") -}}
  {{- $name := printf "%s-any" .Release.Name -}}
  {{- range $one := include "suite.roles" . | fromJsonArray -}}
    {{- if eq $one.role "any" -}}{{- printf "%s/%s" (ternary "deployment" "lws" (eq (int $one.nodes) 1)) $name -}}{{- end -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{/* Rules of a Role, from the table that vllm_suite/kube/verbs.py is. */}}
{{- define "suite.rules" -}}
{{- $root := .root -}}
{{- $scaled := include "suite.scaled" $root -}}
{{- $kind := ternary "deployments/scale" "leaderworkersets/scale" (hasPrefix "deployment/" $scaled) -}}
{{- $rules := list -}}
{{- range $right := get ($root.Files.Get "files/rbac.yaml" | fromYaml) .component -}}
  {{- $rule := dict "apiGroups" (list $right.group) "resources" (list $right.resource) "verbs" $right.verbs -}}
  {{- if eq $right.names "lease" -}}
    {{- $_ := set $rule "resourceNames" (list (printf "%s-controller" $root.Release.Name)) -}}
  {{- else if eq $right.names "any" -}}
    {{- $_ := set $rule "resourceNames" (list (printf "%s-any" $root.Release.Name)) -}}
  {{- end -}}
  {{- if or (ne $right.names "any") (and $scaled (eq $right.resource $kind)) -}}{{- $rules = append $rules $rule -}}{{- end -}}
{{- end -}}
{{ toYaml $rules }}
{{- end -}}
