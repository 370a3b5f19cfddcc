"""Which roles a chat template has of its own, and which of them are the assistant's."""

from loragrid.data.chats.template import ANSWER, OTHER_TEMPLATE, QUESTION, ChatRefusedError, ChatTemplate
from loragrid.data.shapes.messages import TOOL_ROLES

OTHER_ROLES = ("system", "developer", "user", "tool", "function", *TOOL_ROLES)
"""Roles that are never the assistant's."""


class ChatRoles:
    """Knows the roles of one template."""

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._own: dict[str, bool] = {}
        self._speaks: dict[str, bool | None] = {}

    def has(self, role: str) -> bool:
        """Whether a role is the template's own: its source names it, or the role becomes a token of the tokenizer."""
        if role not in self._own:
            self._own[role] = self.template.names_role(role) or self._writes_token(role)
        return self._own[role]

    def is_assistant(self, role: str) -> bool:
        """Whether the messages of a role are the model's: the template writes them behind its generation prompt.

        Raises:
            ChatRefusedError: the role is the template's own, and the template writes nothing that would tell.
        """
        if role == "assistant":
            return True
        if role in OTHER_ROLES or not self.has(role):
            return False
        if role not in self._speaks:
            self._speaks[role] = self._follows_prompt(role)
        if self._speaks[role] is None:
            raise ChatRefusedError(
                f"the role {role} is the chat template's own, and whether the model writes it cannot be told, because "
                f"the template writes nothing before an answer; {OTHER_TEMPLATE}"
            )
        return bool(self._speaks[role])

    def _follows_prompt(self, role: str) -> bool | None:
        """Whether the template writes a role's message as an answer; None if it writes nothing before answers."""
        template = self.template
        question = template.trial("user", QUESTION)
        try:
            asked = template.prompt([question])
            said = template.render([question, template.trial(role, ANSWER)])
        except ChatRefusedError:
            return False
        if ANSWER not in said:
            return False
        return said.startswith(asked) if template.opening.prompt else None

    def _writes_token(self, role: str) -> bool:
        """Whether the role's header holds an added token with the role in it, which a question's header lacks."""
        template, question = self.template, self.template.trial("user", QUESTION)
        for before in ([question], []):
            try:
                said, asked = (template.render([*before, template.trial(name, ANSWER)]) for name in (role, "user"))
            except ChatRefusedError:
                continue
            own, others = (set(template.token.findall(text.rpartition(ANSWER)[0])) for text in (said, asked))
            if role and any(role == token.strip("<|>[]") for token in own - others):
                return True
        return False
