"""What clients have set of their conversations: one small record each, where there is any."""

from __future__ import annotations

from collections.abc import Iterator

from engram.errors import StoreFormatError
from engram.snapshot.conversation import (
    MAX_CONVERSATION_BYTES,
    ConversationRecord,
    decode_conversation,
    encode_conversation,
)
from engram.store.base import ConversationStore
from engram.store.durable import DirectoryMaker, unlink_durable, write_durable
from engram.store.filesystem import FileSystem
from engram.store.layout import Layout
from engram.store.quarantine import Quarantine
from engram.store.record_files import read_small_file, refuse_newer


class DiskConversations(ConversationStore):
    """The conversation records of a `DiskStore`."""

    _layout: Layout
    _directories: DirectoryMaker
    _quarantine: Quarantine
    _fs: FileSystem

    def put_conversation(self, record: ConversationRecord) -> None:
        path = self._layout.conversation(record.name)
        self._directories.ensure(path.parent)
        data = encode_conversation(record)
        write_durable(path, [data], needed=len(data), fs=self._fs)

    def delete_conversation(self, record: ConversationRecord) -> None:
        unlink_durable(self._layout.conversation(record.name), self._fs)

    def iter_conversations(self) -> Iterator[ConversationRecord]:
        for path in sorted(self._layout.conversations.glob("??/*.json")):
            data = read_small_file(path, MAX_CONVERSATION_BYTES, self._fs)
            if data is None:
                continue  # deleted meanwhile
            try:
                refuse_newer("a conversation record", data, 1)
                record = decode_conversation(data)
                if record.name != path.name:
                    raise ValueError("it is the record of another conversation")
            except StoreFormatError:
                continue  # of a newer version, which knows more: it stays where it is
            except ValueError as error:
                self._quarantine.take(path, f"conversation record: {error}")
                continue
            yield record
