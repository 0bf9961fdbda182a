"""From files of text, chats and translations to batches of tokens."""
