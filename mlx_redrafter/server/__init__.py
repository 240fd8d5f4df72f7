"""The HTTP server: OpenAI's and Anthropic's interfaces to models that draft. Never imported when generating."""
