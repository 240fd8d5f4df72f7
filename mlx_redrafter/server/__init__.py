"""The HTTP server: OpenAI's and Anthropic's interfaces over engines. Never imported when generating."""
