"""Chat: the assistant's messages of a conversation, in the model's chat template."""

import logging
from bisect import bisect_left
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fedtune.contracts.rows import RowSet
from fedtune.contracts.task import IGNORED, Example
from fedtune.models.tasks._answers import AnswerTask
from fedtune.models.tasks._tokens import check_date
from fedtune.storage.parsing import parse_json

if TYPE_CHECKING:
    from fedtune.config import Config
    from fedtune.models.chat_template import Conversation

log = logging.getLogger("fedtune.tasks")
_AFTER = 32  # most tokens that a template adds after an answer


class Chat(AnswerTask):
    """The tokens of all assistant messages, each with its end token, are the targets.

    The metrics are those of instruction, with exact match for the last answer of each conversation.
    """

    columns = {"messages": "messages"}
    columns_hint = ", or the templates data.prompt and data.answer"
    encoder_decoder = False
    conversational = True

    def encode(self, rows: RowSet, tokenizer: Any, *, encoder_decoder: bool, keep_short: bool) -> list[Example]:
        """One example per conversation. Later turns that do not fit are left out. A conversation becomes an example without a target with
        `keep_short`, and otherwise is left out, if its first answer does not fit or the template does not show one of its tool calls."""
        import numpy as np

        from fedtune.data.examples import filler
        from fedtune.models.chat_template import located

        out, cut, long, hidden = [], 0, 0, 0
        for conversation, where in self._conversations(rows, tokenizer):
            with located(where):
                hides = conversation.hides_a_call()
                example, whole = (None, False) if hides else self._fitting(conversation)
            hidden += hides
            long += example is None and not hides
            cut += example is not None and not whole
            if example is None and keep_short:
                example = Example(np.full(2, filler(tokenizer), np.int32), np.full(2, IGNORED, np.int32))
            if example is not None:
                out.append(example)
        if cut or long:
            log.warning(
                "later turns of %d of %d conversations are left out, and %d conversations whose first answer does not fit into %d tokens"
                " (task.max_length)", cut, len(rows), long, self.settings.max_length,
            )  # fmt: skip
        if hidden:
            log.warning(
                "%d of %d conversations are left out, because the model's chat template does not show their tool calls", hidden, len(rows)
            )
        return out

    def unusable(self, rows: RowSet, tokenizer: Any) -> str:
        from fedtune.models.chat_template import encode_start, located

        lengths: list[int] = []
        for conversation, where in self._conversations(rows, tokenizer):
            with located(where):
                if not conversation.hides_a_call():
                    first = next(i for i, m in enumerate(conversation.messages) if m["role"] == "assistant")
                    lengths.append(len(encode_start(conversation, first + 1)[0]))
        if not lengths:
            return (
                f"the model's chat template does not show the tool calls of {len(rows)} conversations: give rows without tool calls, or a"
                " model whose template shows them"
            )
        return (
            f"none of {len(rows)} conversations fits into task.max_length={self.settings.max_length}; the shortest needs {min(lengths)}"
            " tokens: raise task.max_length"
        )

    def _conversations(self, rows: RowSet, tokenizer: Any) -> "Iterator[tuple[Conversation, str]]":
        """Each row as a conversation, and the row's name in the source."""
        from fedtune.models.chat_template import Conversation

        names = rows["row"][:] if "row" in rows.column_names else [f"row {i + 1}" for i in range(len(rows))]
        schemas = rows["tools"][:] if "tools" in rows.column_names else [""] * len(rows)
        for text, tools, name in zip(rows["messages"][:], schemas, names, strict=True):
            found = parse_json(tools) if tools else None
            yield Conversation(tokenizer, parse_json(text), tools=found, date=self.settings.date), name

    def check(self, config: "Config") -> None:
        super().check(config)
        check_date(self.settings)

    def answer_length(self, example: Example) -> int:
        return len(example.labels) - example.prompt_length

    def answer_end(self, tokenizer: Any) -> int | None:
        from fedtune.models.chat_template import answer_end

        return answer_end(tokenizer)

    def _fitting(self, conversation: "Conversation") -> tuple[Example | None, bool]:
        """The longest start of the conversation that fits and ends with an answer, and whether it has all answers."""
        from fedtune.models.chat_template import encode_start

        most = self.settings.max_length
        answers = [i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"]

        def excess(count: int) -> bool:  # rough, because exact lengths take time quadratic in the number of messages
            return len(conversation.tokens(answers[count] + 1)[0]) > most + _AFTER

        near = len(answers) if not excess(len(answers) - 1) else bisect_left(range(len(answers)), True, key=excess)
        for number, last in reversed(list(enumerate(answers[:near]))):
            ids, labels, begun = encode_start(conversation, last + 1)
            if len(ids) <= most:
                answer = conversation.tokenizer.decode(ids[begun:].tolist(), skip_special_tokens=True)
                return Example(ids, labels, begun, answer), number == len(answers) - 1
        return None, False
