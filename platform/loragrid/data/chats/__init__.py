"""Renders chats with a chat template, and finds what of them is learnt."""
