"""``dllm-fast serve``: OpenAI's completions over HTTP, from one batch whose seats are filled as requests come."""
