"""Who owns a listening port, from Linux's own tables. Pure text."""

from __future__ import annotations

#: Works in every login shell. The marker tells the user id from what start files may print.
OWNER_COMMAND = "echo bokeh-ssh-owner; id -u; cat /proc/net/tcp /proc/net/tcp6"
_LISTEN = "0A"


def find_owner(text: str, port: int) -> tuple[int, int] | None:
    r"""Find (our user id, the owner's user id) of the listener on ``port`` in the output of the command.

    Several listeners (one for each family): one that is not ours counts.

    >>> table = "sl local_address rem_address st tx rx tr tm retr uid\n"
    >>> row = "0: 0100007F:138E 00000000:0000 0A 00000000:00000000 00:00000000 00000000 1001 0 1 1\n"
    >>> find_owner("bokeh-ssh-owner\n1000\n" + table + row, 5006)
    (1000, 1001)
    """
    lines = text.partition("bokeh-ssh-owner")[2].split("\n")
    digits = [line.strip() for line in lines if line.strip().isdigit()]
    if not digits:
        return None
    me = int(digits[0])
    owners = set()
    for line in lines:
        fields = line.split()
        if len(fields) > 9 and fields[3] == _LISTEN and fields[7].isdigit():
            _, _, hexport = fields[1].rpartition(":")
            if hexport and int(hexport, 16) == port:
                owners.add(int(fields[7]))
    if not owners:
        return None
    return me, next((owner for owner in owners if owner != me), me)
