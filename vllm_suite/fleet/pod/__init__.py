"""What Kubernetes runs inside a pod of the fleet: readiness, drain, and the chart's test.

    python3 -m vllm_suite.fleet.pod ready --role prefill --connector SuiteNixlConnector
    python3 -m vllm_suite.fleet.pod router-ready
    python3 -m vllm_suite.fleet.pod drain --settle 10 --finish 300
    python3 -m vllm_suite.fleet.pod check --router http://llm-router --decode http://llm-decode:8000

Probes run every few seconds and in every container, so this is the standard library alone. An exec probe has the keys
in its environment; one by HTTP would have to carry them in the pod's spec. Exit status 0 means yes.
"""
