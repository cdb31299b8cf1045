"""What the events of a tunnel or a forward tell."""

from __future__ import annotations

from bokeh_ssh import Closed, Event, Lost, Ready, Reconnected, Reconnecting


def kinds(events: list[Event]) -> list[type[Event]]:
    """Tell what happened, without what belongs to the first login and to each one after it."""
    told = (Ready, Lost, Reconnecting, Reconnected, Closed)
    return [type(event) for event in events if isinstance(event, told)]
