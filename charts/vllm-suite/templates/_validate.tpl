{{/* What FleetSpec checks across fields; the schema has checked each field. */}}
{{- define "suite.validate" -}}
{{- $v := .Values -}}
{{- $k := $v.kubernetes -}}
{{- $counts := dict -}}
{{- $start := dig "roles" "start" dict (omit $v.AsMap "kubernetes") -}}
{{- range $role := list "encode" "prefill" "decode" "any" -}}
  {{- $pool := get $v.pools $role -}}
  {{- $_ := set $counts $role 0 -}}
  {{- if hasKey $v.pools $role -}}{{- if not (kindIs "invalid" $pool) -}}
    {{- $_ := set $counts $role (int (include "suite.replicas" (dict "root" $ "role" $role "pool" $pool))) -}}
  {{- end -}}{{- end -}}
{{- end -}}
{{- if not (or $counts.decode $counts.any) -}}
  {{- fail "pools: a fleet needs a decode or an any instance" -}}
{{- end -}}
{{- if and $counts.encode (not (has "epd" $v.plugins)) -}}
  {{- fail "pools.encode: encoder instances need plugin epd" -}}
{{- end -}}
{{- range $role := list "encode" "prefill" "decode" "any" -}}
  {{- if get $counts $role -}}
    {{- $engine := include "suite.engine" (dict "root" $ "pool" (get $v.pools $role)) | fromJson -}}
    {{- if gt (int (default 1 $engine.pipeline_parallel_size)) 1 -}}
      {{- if and (eq $role "decode") (has "disagg" $v.plugins) -}}
        {{- fail (printf "pools.%s: pipeline_parallel_size: vLLM's NIXL connector takes no pipeline stages on decode; use tensor_parallel_size" $role) -}}
      {{- end -}}
      {{- if and $counts.encode (has "epd" $v.plugins) -}}
        {{- fail (printf "pools.%s: pipeline_parallel_size: encoder outputs are not taken by pipeline stages; use tensor_parallel_size" $role) -}}
      {{- end -}}
    {{- end -}}
    {{- if and $counts.encode (has "--language-model-only" $engine.args) -}}
      {{- fail (printf "pools.%s: --language-model-only refuses media, so there is nothing for pools.encode to encode" $role) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- if and $start.encode (not (has "epd" $v.plugins)) -}}
  {{- fail (printf "roles.start.encode: encoding needs plugin epd; plugins is %s" (toJson $v.plugins)) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]" .Release.Name) -}}
  {{- fail (printf "release name %s: names of Services begin with a letter" .Release.Name) -}}
{{- end -}}
{{- if and (include "suite.controls" $) (not $counts.any) -}}
  {{- fail "roles.control: pools.any has no instance whose role could change" -}}
{{- end -}}
{{- if and (dig "roles" "scale" dict (omit $v.AsMap "kubernetes")) (dig "pools" "any" "autoscaling" dict $k) -}}
  {{- fail "roles.scale and kubernetes.pools.any.autoscaling would both set the size of the pool; give one" -}}
{{- end -}}
{{- if and (include "suite.controls" $) (dig "pools" "any" "autoscaling" dict $k) -}}
  {{- fail "kubernetes.pools.any.autoscaling: routers count an instance under the role that the controller gave it, so nothing would be counted for any; use roles.scale" -}}
{{- end -}}
{{- $wanted := add (int (default 0 $start.encode)) (int (default 0 $start.prefill)) (int (default 0 $start.decode)) -}}
{{- if gt (int $wanted) (int $counts.any) -}}
  {{- fail (printf "roles.start: %d instances, and pools.any has %d" (int $wanted) (int $counts.any)) -}}
{{- end -}}
{{- if dig "router" "membership" "kubernetes" list (omit $v "kubernetes") -}}
  {{- fail "router.membership.kubernetes: the chart writes it where kubernetes.discovery is endpoints" -}}
{{- end -}}
{{- if and $k.gateway.hostnames (not $k.gateway.parents) -}}
  {{- fail "kubernetes.gateway.hostnames: give parents, the Gateways that the route attaches to" -}}
{{- end -}}
{{- $auth := dig "router" "auth" dict (omit $v "kubernetes") -}}
{{- range $name := list "api_key_file" "upstream_api_key_file" "control_key_file" -}}
  {{- if get $auth $name -}}
    {{- fail (printf "router.auth.%s is a file of the machine that runs `up`; here keys are in a Secret: kubernetes.keys.existing_secret" $name) -}}
  {{- end -}}
{{- end -}}
{{- if gt (len (default list $auth.api_keys)) 1 -}}
  {{- fail "router.auth.api_keys: one key can be given here; list several in a Secret of their own: kubernetes.keys.client_secret" -}}
{{- end -}}
{{- if and $k.keys.existing_secret (or $auth.api_keys $auth.upstream_api_key $auth.control_key) -}}
  {{- fail "kubernetes.keys.existing_secret holds the fleet's keys; leave them out of router.auth" -}}
{{- end -}}
{{- if and $k.keys.require_api_key (not $k.keys.existing_secret) -}}
  {{- fail "kubernetes.keys.require_api_key goes with existing_secret; otherwise give router.auth.api_keys" -}}
{{- end -}}
{{- if and $k.keys.client_secret $k.keys.existing_secret (not $k.keys.require_api_key) -}}
  {{- fail "kubernetes.keys.client_secret: existing_secret needs an api-key too (require_api_key: true), which probes, helm test and Prometheus send" -}}
{{- end -}}
{{- if and $k.model.claim $k.model.image -}}
  {{- fail "kubernetes.model: give claim or image" -}}
{{- end -}}
{{- if and $k.model.image (semverCompare "<1.33.0-0" .Capabilities.KubeVersion.Version) -}}
  {{- fail (printf "kubernetes.model.image needs image volumes: Kubernetes 1.33 or later, this is %s" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- if and (or $k.model.claim $k.model.image) (not (hasPrefix (printf "%s/" (trimSuffix "/" $k.model.mount_path)) (printf "%s/" (trimSuffix "/" $v.model)))) -}}
  {{- fail (printf "model: %s is not below kubernetes.model.mount_path %s" $v.model $k.model.mount_path) -}}
{{- end -}}
{{- if and (not (or $k.model.claim $k.model.image)) (or (hasPrefix "/" $v.model) (hasPrefix "." $v.model)) -}}
  {{- fail (printf "model: %s is a folder; say in kubernetes.model which claim or image holds it" $v.model) -}}
{{- end -}}
{{- if dig "membership" "withdrawn_file" "" (default dict $v.router) -}}
  {{- fail "router.membership.withdrawn_file: `up` writes it, of its own instances; leave it out" -}}
{{- end -}}
{{- if dig "lengths" "state_file" "" (default dict $v.router) -}}
  {{- fail "router.lengths.state_file: a router's pod keeps no files; leave it out" -}}
{{- end -}}
{{- range $name := list "ttft" "tpot" -}}
  {{- $times := get (default dict $v.predicted) $name | default dict -}}
  {{- range $pair := list (list "p50" "p99") (list "p50_low" "p50") (list "p50" "p50_high") (list "p99_low" "p99") (list "p99" "p99_high") -}}
    {{- $less := get $times (first $pair) -}}{{- $more := get $times (last $pair) -}}
    {{- if and $less $more -}}
      {{- if gt (float64 (include "suite.milliseconds" $less)) (float64 (include "suite.milliseconds" $more)) -}}
        {{- fail (printf "predicted.%s: %s %s is above %s %s" $name (first $pair) $less (last $pair) $more) -}}
      {{- end -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- end -}}

{{/* Replicas of a pool: the lower bound where it is scaled. */}}
{{- define "suite.replicas" -}}
{{- $scaling := dig "kubernetes" "pools" .role "autoscaling" dict .root.Values.AsMap -}}
{{- if $scaling -}}{{ int64 (default 1 $scaling.min_replicas) }}
{{- else if hasKey .pool "replicas" -}}{{ int64 .pool.replicas }}
{{- else -}}1{{- end -}}
{{- end -}}
