"""The law of user errors: one line, whatever their words bring along."""

import pickle

from core.errors import InputError


def test_a_message_is_one_line_and_shows_what_would_have_broken_it():
    text = "expected a, found " + "".join(map(chr, [*range(0x20), 0x7F, 0x85, 0xA0, 0x2028, 0x2029, 0xE9]))
    message = str(InputError(text))
    assert len(message.splitlines()) == 1
    assert "\\n" in message and "\\r" in message and "\\u2028" in message and "é" in message
    assert str(InputError(message)) == message == str(pickle.loads(pickle.dumps(InputError(text))))
