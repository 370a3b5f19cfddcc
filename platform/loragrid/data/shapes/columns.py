"""The names of columns by which shapes of rows are recognised."""

ROW_KINDS = (("messages",), ("prompt", "completion"), ("text",))
"""The canonical columns of each kind of row; a data set is read as exactly one kind."""
OF_CHATS = ("system", "tools")
"""Canonical columns that a chat may have beside its messages."""
EXCLUDING = ("weight", "train")
"""Columns that say of a row whether it is trained."""
CHATS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", "question", "instruction", "query", "problem", "input")
ANSWERS = ("completion", "answer", "response", "output", "solution")
SYSTEMS = ("system", "system_prompt", "system_message")
