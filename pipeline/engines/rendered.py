"""What the engines that hold their tokenizer share: a request's tokens, checked, and a reply from its own."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.engines.base import Reply, Request, Usage
from pipeline.errors import RequestFailed
from pipeline.lm.templates import Chat, split_reasoning
from pipeline.records import Prompt


class Renderer:
    """context: longest prompt plus reply in tokens, None if unknown. neutralised: as in engines.base.Engine."""

    def __init__(self, chat: Chat, context: int | None) -> None:
        self.chat = chat
        self.context = context
        self.neutralised = 0
        self._longest_token = max(map(len, chat.tokenizer.get_vocab()))

    def prompt(self, request: Request) -> list[int]:
        """The prompt's tokens. Raises RequestFailed (`too_long`, `bad_roles`, `empty_prompt`)."""
        self._check_characters(request.prompt)
        encoded = self.chat.prompt(request.prompt, reasoning=not request.labels)
        self.neutralised += encoded.neutralised
        if not encoded.token_ids:
            raise RequestFailed("empty_prompt", "the prompt has no tokens")
        return encoded.token_ids

    def max_tokens(self, request: Request, prompt: Sequence[int]) -> int:
        """What the context leaves of the tokens that were asked for. Raises RequestFailed (`too_long`)."""
        self.check_length(len(prompt), len(prompt) + 1)
        wanted = max(1, request.max_tokens)
        return wanted if self.context is None else min(wanted, self.context - len(prompt))

    def check_length(self, prompt: int | str, needed: int) -> None:
        """prompt: its length, for the message. needed: tokens that must fit."""
        if self.context is not None and needed > self.context:
            advice = "shorten it or raise engine.context as far as the model allows"
            raise RequestFailed("too_long", f"prompt has {prompt} tokens, context is {self.context}; {advice}")

    def reply(self, request: Request, completion: Sequence[int], finish_reason: str, usage: Usage) -> Reply:
        """The reply that these tokens are, its stop string cut off and its reasoning kept apart."""
        opened = self.chat.opens_reasoning and not isinstance(request.prompt, str)
        reasoning, text = split_reasoning(self.chat.text(completion), opened=opened)
        cuts = [text.find(stop) for stop in request.stop if stop in text]
        return Reply(
            text[: min(cuts)] if cuts else text,
            finish_reason,
            token_ids=tuple(completion),
            reasoning=reasoning,
            usage=usage,
        )

    def _check_characters(self, prompt: Prompt) -> None:
        """Refuses a hopeless prompt before it is tokenised: no token holds more characters than the longest one."""
        size = len(prompt) if isinstance(prompt, str) else sum(len(message["content"]) for message in prompt)
        fewest = size // self._longest_token
        self.check_length(f"at least {fewest}", fewest)
