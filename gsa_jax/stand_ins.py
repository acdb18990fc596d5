"""What lies in the place of a file that was never fetched.

May be changed here: what is recognised, and what there is to do about it.
"""

_POINTERS = ((b"version https://git-lfs", "a git-lfs pointer in place of the file; fetch it first: git lfs pull"),)

_PAGES = tuple((tag, "an HTML page in place of the file; download it again") for tag in (b"<!doctype", b"<html"))


def stand_in(head: bytes, *, may_be_a_page: bool = False) -> str | None:
    """A phrase for an `InputError` if a file that begins like this stands in for another; None if it does not.

    Args:
        may_be_a_page: the file itself may well be HTML, as a text may.
    """
    known = _POINTERS if may_be_a_page else _POINTERS + _PAGES
    return next((phrase for beginning, phrase in known if head.lstrip().lower().startswith(beginning)), None)
