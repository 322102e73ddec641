{{/* A value as one word of the command line. toJson keeps large numbers from becoming 1e+06. */}}
{{- define "suite.word" -}}
{{- if kindIs "string" . -}}{{ . }}{{- else -}}{{ toRawJson . }}{{- end -}}
{{- end -}}

{{/* A size in bytes: 268435456, "256MiB" and "1.5GB" as vllm_suite/fleet/units.py reads them. */}}
{{- define "suite.bytes" -}}
{{- if kindIs "string" . -}}
  {{- $text := lower (trim .) -}}
  {{- if not (regexMatch "^[0-9]+([.][0-9]*)?\\s*([kmgt]i?b|b)?$" $text) -}}
    {{- fail (printf "not a size, for example 256MiB or 2GB: %q" .) -}}
  {{- end -}}
  {{- $units := dict "" 1 "b" 1 "kib" 1024 "mib" 1048576 "gib" 1073741824 "tib" 1099511627776 "kb" 1000 "mb" 1000000 "gb" 1000000000 "tb" 1000000000000 -}}
  {{- $number := float64 (regexFind "^[0-9]+([.][0-9]*)?" $text) -}}
  {{- $unit := regexFind "[a-z]*$" $text -}}
  {{- int64 (mulf $number (float64 (get $units $unit))) -}}
{{- else -}}{{ int64 . }}{{- end -}}
{{- end -}}

{{/* The engine section of a pool as JSON: the shared one with the pool's keys over it, and both `args`. */}}
{{- define "suite.engine" -}}
{{- $shared := default dict .root.Values.engine -}}
{{- $own := default dict .pool.engine -}}
{{- $engine := dict -}}
{{- range $key, $value := $shared -}}{{- $_ := set $engine $key $value -}}{{- end -}}
{{- range $key, $value := $own -}}{{- $_ := set $engine $key $value -}}{{- end -}}
{{- $_ := set $engine "args" (concat (default list $shared.args) (default list $own.args)) -}}
{{- if eq .root.Values.kubernetes.device "cpu" -}}
  {{- if or (not (hasKey $engine "enforce_eager")) (kindIs "invalid" (get $engine "enforce_eager")) -}}{{- $_ := set $engine "enforce_eager" true -}}{{- end -}}
  {{- if or (not (hasKey $engine "kv_cache_memory_bytes")) (kindIs "invalid" (get $engine "kv_cache_memory_bytes")) -}}{{- $_ := set $engine "kv_cache_memory_bytes" 1073741824 -}}{{- end -}}
{{- end -}}
{{ toJson $engine }}
{{- end -}}

{{/* GPUs of one instance. */}}
{{- define "suite.gpus" -}}
{{- mul (default 1 .tensor_parallel_size) (default 1 .pipeline_parallel_size) (default 1 .data_parallel_size) -}}
{{- end -}}

{{/* Arguments of `vllm`, as a JSON list: those of vllm_suite/fleet/launch.py. */}}
{{- define "suite.serve" -}}
{{- $v := .root.Values -}}
{{- $args := list "serve" $v.model "--host" "0.0.0.0" "--port" (printf "%d" (int64 $v.kubernetes.api_port)) -}}
{{- if $v.plugins -}}{{- $args = concat $args (list "--plugins" (join "," $v.plugins)) -}}{{- end -}}
{{- if $v.served_model_name -}}{{- $args = concat $args (list "--served-model-name" $v.served_model_name) -}}{{- end -}}
{{- with $v.tracing -}}{{- $args = concat $args (list "--otlp-traces-endpoint" .endpoint) -}}{{- end -}}
{{- range $name := .root.Files.Get "files/engine-fields.yaml" | fromYamlArray -}}
  {{- $value := get $.engine $name -}}
  {{- $flag := replace "_" "-" $name -}}
  {{- if not (hasKey $.engine $name) -}}
  {{- else if kindIs "invalid" $value -}}
  {{- else if kindIs "bool" $value -}}
    {{- $args = append $args (printf "%s%s" (ternary "--" "--no-" $value) $flag) -}}
  {{- else if eq $name "kv_cache_memory_bytes" -}}
    {{- $args = concat $args (list (printf "--%s" $flag) (include "suite.bytes" $value)) -}}
  {{- else -}}
    {{- $args = concat $args (list (printf "--%s" $flag) (include "suite.word" $value)) -}}
  {{- end -}}
{{- end -}}
{{- range .engine.args -}}{{- $args = append $args . -}}{{- end -}}
{{- /* Kubernetes would put a variable's value in the place of $(NAME). */ -}}
{{- $plain := list -}}
{{- range $args -}}{{- $plain = append $plain (replace "$(" "$$(" .) -}}{{- end -}}
{{- $args = $plain -}}
{{- if gt (int .nodes) 1 -}}
  {{- $args = concat $args (list "--nnodes" (toString .nodes) "--node-rank" "$(LWS_WORKER_INDEX)" "--master-addr" "$(LWS_LEADER_ADDRESS)") -}}
{{- end -}}
{{ toJson $args }}
{{- end -}}
