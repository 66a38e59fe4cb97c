"""An author behind an OpenAI-compatible endpoint: vLLM, llama.cpp, Ollama, a paid service.

pip install 'fedrag-jax[endpoint]'
"""

import concurrent.futures
import dataclasses
import functools
import os
from collections.abc import Iterator, Sequence

from fedrag_jax.errors import ConfigError, FedragError, missing
from fedrag_jax.generation.author import Reply, Request
from fedrag_jax.generation.text import Sampling


class EndpointError(FedragError):
    """An endpoint does not answer, or returns an invalid answer."""


@dataclasses.dataclass(frozen=True)
class EndpointAuthor:
    """An author that calls `POST {base_url}/chat/completions`.

    The beginning of a reply is not sent, because few endpoints support it; a reply that begins with
    `start` is parsed in the same way.

    Attributes:
      base_url: address including /v1.
      model: the endpoint's name of the model.
      api_key: API key; default: $OPENAI_API_KEY. Many local endpoints accept any key.
      timeout: seconds for one reply.
      retries: retries after a connection error, a timeout, or a status of 408, 409, 429 or 5xx; the
        waits between them grow and follow the endpoint's Retry-After.
      at_once: maximum number of concurrent requests.

    Raises:
      ConfigError: the `openai` package is missing, or a number out of its range.
    """

    base_url: str
    model: str
    api_key: str | None = None
    timeout: float = 120.0
    retries: int = 5
    at_once: int = 8

    def __post_init__(self):
        if not self.timeout > 0 or self.retries < 0 or self.at_once < 1:
            raise ConfigError(
                "an endpoint needs timeout > 0, retries >= 0 and at_once >= 1, got "
                f"{self.timeout}, {self.retries} and {self.at_once}"
            )
        _openai()

    @property
    def name(self) -> str:
        """The model's name, because its replies do not depend on where it runs."""
        return self.model

    @property
    def _where(self) -> str:
        return f"{self.model} at {self.base_url}"

    @functools.cached_property
    def _client(self):
        return _openai().OpenAI(
            base_url=self.base_url,
            # The package wants one even where the endpoint does not.
            api_key=self.api_key or os.environ.get("OPENAI_API_KEY") or "none",
            timeout=self.timeout,
            max_retries=self.retries,
        )

    def __call__(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Reply]:
        """Yields a reply for each request, in order.

        Raises:
          ConfigError: a request that is a plain text to continue.
          EndpointError: no answer after the last retry, a refusal, or an invalid answer.
        """
        if not all(request.chat for request in requests):
            raise ConfigError(
                f"{self._where} is a chat endpoint, but these prompts are texts to continue: use "
                "prompts with instructions ('instruct'), or a local generator"
            )
        with concurrent.futures.ThreadPoolExecutor(self.at_once) as pool:
            yield from pool.map(functools.partial(self._reply, sampling), requests)

    def _reply(self, sampling: Sampling, request: Request) -> Reply:
        system = [{"role": "system", "content": request.system}] if request.system else []
        try:
            found = self._client.chat.completions.create(
                model=self.model,
                messages=[*system, {"role": "user", "content": request.user}],
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
                **({"stop": [*sampling.stop]} if sampling.stop else {}),
            )
        except (_openai().OpenAIError, ValueError) as error:  # a ValueError: what came is no JSON
            cause = f" ({error.__cause__})" if error.__cause__ else ""
            raise EndpointError(
                f"{self._where}: {type(error).__name__}: {error}{cause}; is it running, and does it "
                "have the model? Replies received so far are kept"
            ) from error
        choices = getattr(found, "choices", None)
        if not choices:
            raise EndpointError(
                f"{self._where}: the answer holds no text: {found!r}; is this the address of a chat "
                "completions API, up to and with /v1?"
            )
        # A refusal, or a model that thought until the limit: no text, and nothing to read.
        return Reply(choices[0].message.content or "", choices[0].finish_reason == "stop")


def _openai():
    try:
        import openai
    except ImportError as error:
        raise missing("an endpoint needs the openai package", "endpoint") from error
    return openai
