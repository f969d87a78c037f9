"""Chat: the assistant's messages of a conversation, in the model's chat template."""

import logging
from bisect import bisect_left
from typing import TYPE_CHECKING, Any

from fedtune.contracts.task import IGNORED, Example
from fedtune.models.tasks._answers import AnswerTask
from fedtune.storage.parsing import parse_json

if TYPE_CHECKING:
    import datasets

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

    def encode(self, rows: "datasets.Dataset", tokenizer: Any, *, encoder_decoder: bool, keep_short: bool) -> list[Example]:
        """One example per conversation. Later turns that do not fit are left out; a conversation whose first answer does not fit becomes an
        example without a target with `keep_short`, and otherwise is left out."""
        import numpy as np

        from fedtune.data.examples import filler
        from fedtune.models.chat_template import Conversation

        out, cut, dropped = [], 0, 0
        for text in rows["messages"][:]:
            messages = parse_json(text)
            example, whole = self._fitting(Conversation(tokenizer, messages))
            cut += example is not None and not whole
            dropped += example is None
            if example is None and keep_short:
                example = Example(np.full(2, filler(tokenizer), np.int32), np.full(2, IGNORED, np.int32))
            if example is not None:
                out.append(example)
        if cut or dropped:
            log.warning(
                "later turns of %d of %d conversations are left out, and %d conversations whose first answer does not fit into %d tokens"
                " (task.max_length)", cut, len(rows), dropped, self.settings.max_length,
            )  # fmt: skip
        return out

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
