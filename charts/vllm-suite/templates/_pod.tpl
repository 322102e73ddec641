{{/* Environment of an instance: vllm_suite/fleet/launch.py's, with the pod's address, and keys from the Secret. */}}
{{- define "suite.instanceEnv" -}}
{{- $k := .root.Values.kubernetes -}}
{{- $env := dict
  "VLLM_SUITE_ROLE" .role
  "VLLM_NIXL_SIDE_CHANNEL_HOST" "$(POD_IP)"
  "VLLM_NIXL_SIDE_CHANNEL_PORT" (printf "%d" (int64 $k.side_channel_port))
  "VLLM_HOST_IP" "$(POD_IP)"
  "VLLM_NO_USAGE_STATS" "1"
  "PYTHONUNBUFFERED" "1"
  "USER" "vllm"
  "HOME" "/cache"
  "HF_HOME" "/cache/huggingface"
  "VLLM_CACHE_ROOT" "/cache/vllm"
  "XDG_CACHE_HOME" "/cache/xdg"
  "TRITON_CACHE_DIR" "/cache/triton"
  "TORCHINDUCTOR_CACHE_DIR" "/cache/inductor" -}}
{{- if and (has .role (list "encode" "any")) (has "epd" .root.Values.plugins) -}}
  {{- $_ := set $env "VLLM_EC_SIDE_CHANNEL_HOST" "$(POD_IP)" -}}
  {{- $_ := set $env "VLLM_EC_SIDE_CHANNEL_PORT" (printf "%d" (int64 $k.item_port)) -}}
{{- end -}}
{{- with .root.Values.tracing -}}
  {{- $_ := set $env "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL" "http/protobuf" -}}
  {{- $_ := set $env "OTEL_SERVICE_NAME" (printf "%s-%s" $.root.Release.Name $.role) -}}
  {{- $_ := set $env "OTEL_RESOURCE_ATTRIBUTES" (printf "service.namespace=%s,service.instance.id=$(VLLM_SUITE_INSTANCE_ID)" $.root.Release.Name) -}}
{{- end -}}
{{- if eq .role "any" -}}
  {{- $limits := dict -}}
  {{- $some := false -}}
  {{- range $role := list "encode" "prefill" "decode" "any" -}}
    {{- $own := dict -}}
    {{- range $name, $value := dig "roles" "limits" $role dict (omit $.root.Values.AsMap "kubernetes") -}}
      {{- if not (kindIs "invalid" $value) -}}{{- $_ := set $own $name $value -}}{{- $some = true -}}{{- end -}}
    {{- end -}}
    {{- $_ := set $limits $role $own -}}
  {{- end -}}
  {{- if $some -}}{{- $_ := set $env "VLLM_SUITE_ROLE_LIMITS" (toRawJson $limits) -}}{{- end -}}
{{- end -}}
{{- if or $k.model.claim $k.model.image -}}{{- $_ := set $env "HF_HUB_OFFLINE" "1" -}}{{- end -}}
{{- if eq $k.device "cpu" -}}
  {{- $_ := set $env "CUDA_VISIBLE_DEVICES" "" -}}
  {{- $_ := set $env "OMP_NUM_THREADS" (toString (int64 $k.cpu_threads)) -}}
  {{- $_ := set $env "VLLM_CPU_OMP_THREADS_BIND" "nobind" -}}
  {{- if eq (include "suite.gpus" .engine) "1" -}}{{- $_ := set $env "VLLM_ENABLE_V1_MULTIPROCESSING" "0" -}}{{- end -}}
{{- end -}}
{{- range $given := list (default dict .root.Values.env) (default dict .pool.env) -}}
  {{- range $name, $value := $given -}}{{- $_ := set $env $name (replace "$(" "$$(" $value) -}}{{- end -}}
{{- end -}}
{{- $_ := unset $env "VLLM_SUITE_FLEET_KEY" -}}
{{- range $name := list "VLLM_API_KEY" "VLLM_SUITE_CONTROL_KEY" "VLLM_SUITE_INSTANCE_ID" "POD_IP" "HF_TOKEN" -}}
  {{- if hasKey $env $name -}}{{- fail (printf "env: %s is set by the chart, from a Secret or the pod itself" $name) -}}{{- end -}}
{{- end -}}
- name: POD_IP
  valueFrom:
    fieldRef:
      fieldPath: status.podIP
- name: VLLM_SUITE_INSTANCE_ID
  valueFrom:
    fieldRef:
      fieldPath: metadata.name
{{ include "suite.keyEnv" (dict "root" .root "env" "VLLM_API_KEY" "key" "upstream-key") }}
{{ include "suite.keyEnv" (dict "root" .root "env" "VLLM_SUITE_CONTROL_KEY" "key" "control-key") }}
{{ include "suite.keyEnv" (dict "root" .root "env" "VLLM_SUITE_FLEET_KEY" "key" "fleet-key") }}
{{- with $k.model.hub_secret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: token
{{- end }}
{{- range $name, $value := $env }}
- name: {{ $name }}
  value: {{ $value | quote }}
{{- end }}
{{- end -}}

{{/* Template of an instance's pod. `worker` is true for the nodes of an instance that serve nothing themselves. */}}
{{- define "suite.instancePod" -}}
{{- $k := .root.Values.kubernetes -}}
{{- $settings := include "suite.podSettings" (dict "shared" $k.instances "own" (get $k.pools .role)) | fromJson -}}
{{- $suite := gt (len .root.Values.plugins) 0 -}}
{{- $url := printf "http://127.0.0.1:%d" (int64 $k.api_port) -}}
metadata:
  labels:
    {{- range $name, $value := $settings.labels }}
    {{ $name }}: {{ $value | quote }}
    {{- end }}
    {{- include "suite.selector" (dict "root" .root "component" .role) | nindent 4 }}
    vllm-suite/serves: {{ ternary "false" "true" .worker | quote }}
  {{- with $settings.annotations }}
  annotations: {{ toYaml . | nindent 4 }}
  {{- end }}
spec:
  serviceAccountName: {{ .root.Release.Name }}-instance
  automountServiceAccountToken: false
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ add $k.drain.settle_s $k.drain.finish_s $k.drain.stop_s }}
  securityContext: {{ include "suite.podSecurity" .root | nindent 4 }}
  {{- with $k.image.pull_secrets }}
  imagePullSecrets: {{ include "suite.pullSecrets" . | nindent 4 }}
  {{- end }}
  {{- with include "suite.podPlaces" $settings }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- if and (eq .nodes 1) (ne $k.placement.spread_over (default "" $k.placement.same_domain)) }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: {{ $k.placement.spread_over }}
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels: {{ include "suite.selector" (dict "root" .root "component" .role) | nindent 10 }}
  {{- end }}
  {{- with $k.placement.same_domain }}
  affinity:
    podAffinity:
      {{- if $k.placement.same_domain_required }}
      requiredDuringSchedulingIgnoredDuringExecution:
        - topologyKey: {{ . }}
          labelSelector: {{ include "suite.instances" $.root | nindent 12 }}
      {{- else }}
      preferredDuringSchedulingIgnoredDuringExecution:
        - weight: 100
          podAffinityTerm:
            topologyKey: {{ . }}
            labelSelector: {{ include "suite.instances" $.root | nindent 14 }}
      {{- end }}
  {{- end }}
  containers:
    - name: vllm
      image: {{ include "suite.image" (dict "root" .root "image" $k.image) | quote }}
      imagePullPolicy: {{ $k.image.pull_policy }}
      command: [vllm]
      args:
        {{- $args := include "suite.serve" (dict "root" .root "engine" .engine "nodes" .nodes) | fromJsonArray }}
        {{- if .worker }}{{- $args = append $args "--headless" }}{{- end }}
        {{- range $args }}
        - {{ . | quote }}
        {{- end }}
      env: {{ include "suite.instanceEnv" . | nindent 8 }}
      {{- if not .worker }}
      ports:
        - {name: api, containerPort: {{ int64 $k.api_port }}}
        {{- range $rank := until (int (include "suite.width" .engine)) }}
        - {name: {{ printf "nixl-%d" $rank }}, containerPort: {{ add (int64 $k.side_channel_port) $rank }}}
        {{- if and (has $.role (list "encode" "any")) (has "epd" $.root.Values.plugins) }}
        - {name: {{ printf "items-%d" $rank }}, containerPort: {{ add (int64 $k.item_port) $rank }}}
        {{- end }}
        {{- end }}
      startupProbe:
        httpGet: {path: /health, port: api}
        periodSeconds: 5
        timeoutSeconds: 5
        failureThreshold: {{ div (add (int64 $k.start_timeout_s) 4) 5 }}
      livenessProbe:
        httpGet: {path: /health, port: api}
        periodSeconds: 10
        timeoutSeconds: 10
        failureThreshold: 3
      readinessProbe:
        {{- if $suite }}
        exec:
          command:
            - python3
            - -m
            - vllm_suite.fleet.pod
            - ready
            - --url={{ $url }}
            - --role={{ .role }}
            {{- if and (ne .role "encode") (has "disagg" .root.Values.plugins) (not (contains "--kv-transfer-config" (join " " .engine.args))) }}
            - --connector={{ dig "kv_transfer_config" "kv_connector" "SuiteNixlConnector" .engine }}
            {{- end }}
        {{- else }}
        httpGet: {path: /health, port: api}
        {{- end }}
        periodSeconds: 5
        timeoutSeconds: 10
        failureThreshold: 3
      {{- end }}
      lifecycle:
        preStop:
          exec:
            {{- if .worker }}
            command: [python3, -m, vllm_suite.fleet.pod, outlive, --port={{ int64 $k.api_port }}, --limit={{ add $k.drain.settle_s $k.drain.finish_s }}]
            {{- else if $suite }}
            command: [python3, -m, vllm_suite.fleet.pod, drain, --url={{ $url }}, --settle={{ int64 $k.drain.settle_s }}, --finish={{ int64 $k.drain.finish_s }}]
            {{- else }}
            command: [sleep, {{ int64 $k.drain.settle_s | toString | quote }}]
            {{- end }}
      resources:
        {{- $requests := dict }}
        {{- $limits := dict }}
        {{- range $name, $amount := dig "resources" "requests" dict $settings }}{{- $_ := set $requests $name $amount }}{{- end }}
        {{- range $name, $amount := dig "resources" "limits" dict $settings }}{{- $_ := set $limits $name $amount }}{{- end }}
        {{- if eq $k.device "gpu" }}{{- $_ := set $limits $k.gpu_resource (toString .gpus) }}{{- end }}
        {{- with $k.rdma }}{{- $_ := set $limits .resource (toString (int64 (default 1 .count))) }}{{- end }}
        requests: {{ toYaml $requests | nindent 10 }}
        limits: {{ toYaml $limits | nindent 10 }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
          {{- with $k.rdma }}
          {{- if not (eq (toString .ipc_lock) "false") }}
          add: [IPC_LOCK]
          {{- end }}
          {{- end }}
      volumeMounts:
        - {name: tmp, mountPath: /tmp}
        - {name: cache, mountPath: /cache}
        - {name: shm, mountPath: /dev/shm}
        {{- if $k.model.cache_claim }}
        - {name: downloads, mountPath: /cache/huggingface}
        {{- end }}
        {{- if or $k.model.claim $k.model.image }}
        - {name: model, mountPath: {{ $k.model.mount_path }}, readOnly: true}
        {{- end }}
  volumes:
    - name: tmp
      emptyDir:
        sizeLimit: {{ $k.tmp_size }}
    - name: cache
      emptyDir:
        sizeLimit: {{ $k.model.cache_size }}
    - name: shm
      emptyDir:
        medium: Memory
        sizeLimit: {{ $k.shm_size }}
    {{- with $k.model.cache_claim }}
    - name: downloads
      persistentVolumeClaim:
        claimName: {{ . }}
    {{- end }}
    {{- with include "suite.modelVolume" $k.model }}
    {{- . | nindent 4 }}
    {{- end }}
{{- end -}}

{{/* The volume with the checkpoint, where there is one. */}}
{{- define "suite.modelVolume" -}}
{{- if .claim -}}
- name: model
  persistentVolumeClaim:
    claimName: {{ .claim }}
    readOnly: true
{{- else if .image -}}
- name: model
  image:
    reference: {{ .image | quote }}
    pullPolicy: IfNotPresent
{{- end -}}
{{- end -}}
