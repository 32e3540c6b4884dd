"""Files of ours: written whole or not at all, with a checksum, and read with every damage told in one sentence.

    places.py         whether there is room, whether a file may go there, who else is at it
    atomic.py         files and folders, written under another name, then put into place in one rename
    beside.py         work in a folder beside other processes
    tensors.py        safetensors
    json_objects.py   JSON objects
    digests.py        files whose SHA-256 is known from elsewhere
    kinds.py          what a file is instead of what was meant

How files of others are read is in `ttt.reading`; what a checksum is over, in `ttt.checksums`. No torch is imported
until tensors are read or written.
"""

from __future__ import annotations

from ttt.checksums import DAMAGED
from ttt.file_kinds import NEVER_MEANT, RECORDINGS, FileKind
from ttt.files.atomic import TEMPORARY, sync, temporary_beside, write_bytes, write_folder, write_text, writing
from ttt.files.beside import beside_others, waiting_lock
from ttt.files.digests import require_digests
from ttt.files.json_objects import read_json, write_json
from ttt.files.kinds import kind_of_content, kind_of_file
from ttt.files.places import (
    free_bytes,
    is_locked,
    lock,
    replaced_file,
    require_place,
    require_space,
)
from ttt.files.tensors import (
    Header,
    TensorFacts,
    mapping_errors,
    read_header,
    read_tensors,
    verify_tensors,
    write_tensors,
)

__all__ = [
    "DAMAGED",
    "NEVER_MEANT",
    "RECORDINGS",
    "TEMPORARY",
    "FileKind",
    "Header",
    "TensorFacts",
    "beside_others",
    "free_bytes",
    "is_locked",
    "kind_of_content",
    "kind_of_file",
    "lock",
    "mapping_errors",
    "read_header",
    "read_json",
    "read_tensors",
    "replaced_file",
    "require_digests",
    "require_place",
    "require_space",
    "sync",
    "temporary_beside",
    "verify_tensors",
    "waiting_lock",
    "write_bytes",
    "write_folder",
    "write_json",
    "write_tensors",
    "write_text",
    "writing",
]
