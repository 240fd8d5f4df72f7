"""What is wrong with a request, in words and in numbers."""


class BadRequest(ValueError):
    """A request that cannot be served as it is.

    Args:
        message: what is wrong, and what would be right.
        status: HTTP's.
        code: a word for programs.
        param: the field that is wrong.
    """

    def __init__(
        self, message: str, status: int = 400, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def kind(self) -> str:
        """OpenAI's and Anthropic's word for the status."""
        return kind_of(self.status)


def kind_of(status: int) -> str:
    """OpenAI's and Anthropic's word for an HTTP status."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
    kinds |= {413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error"}
    return kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
