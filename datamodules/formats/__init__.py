"""Reading records from files and datasets, and parsing them to messages; every fault says file, line and field."""

from datamodules.formats.conversations import Conversation, parse_conversation, parse_text
from datamodules.formats.errors import DataError, OverlongError, Place
from datamodules.formats.messages import ROLES, Message
from datamodules.formats.preferences import Preference, parse_preference
from datamodules.formats.prompts import Query, parse_query
from datamodules.formats.readers import RawRecord, read
from datamodules.formats.sources import FileSource, HubSource, Source, resolve

__all__ = [
    "ROLES",
    "Conversation",
    "DataError",
    "FileSource",
    "HubSource",
    "Message",
    "OverlongError",
    "Place",
    "Preference",
    "Query",
    "RawRecord",
    "Source",
    "parse_conversation",
    "parse_preference",
    "parse_query",
    "parse_text",
    "read",
    "resolve",
]
