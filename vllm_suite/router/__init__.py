"""The router: OpenAI routes in front of prefill and decode pools."""
