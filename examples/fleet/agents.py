"""The agents of the fleet: a twin for each device, and one that adds up what the twins tell."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from foundation_nats import Agent, Payload, Signal, State, on
from foundation_nats.agent.sensors import Timer

HOT = 80.0
TELL_EVERY = 2


class Telemetry(Payload, type="device.telemetry"):
    """What a device has measured."""

    number: int
    """Counts the readings of the device from 1."""
    celsius: float
    watt_hours: int


class Told(Payload, type="fleet.told"):
    """What a twin has seen since it told last."""

    readings: int
    watt_hours: int
    hottest: float


class Hot(Payload, type="fleet.hot"):
    """A device is too hot."""

    celsius: float


class Twin(Agent):
    """The state of one device, as far as it has told."""

    class State(State):
        readings: int = 0
        watt_hours: int = 0
        celsius: float = 0.0
        is_hot: bool = False
        out_of_order: int = 0
        untold: Told = Told(readings=0, watt_hours=0, hottest=-273.0)

    @on(Telemetry)
    def measured(self, signal: Signal[Telemetry]) -> None:
        """Take it in; tell the fleet now and then, and at once when it gets too hot."""
        reading, state = signal.data, self.state
        state.readings += 1
        state.out_of_order += reading.number != state.readings
        state.watt_hours += reading.watt_hours
        state.celsius = reading.celsius
        if reading.celsius >= HOT and not state.is_hot:
            self.emit(Hot(celsius=reading.celsius), to="fleet")
        state.is_hot = reading.celsius >= HOT
        state.untold = Told(
            readings=state.untold.readings + 1,
            watt_hours=state.untold.watt_hours + reading.watt_hours,
            hottest=max(state.untold.hottest, reading.celsius),
        )
        if state.untold.readings == TELL_EVERY:
            self.emit(state.untold, to="fleet")
            state.untold = Told(readings=0, watt_hours=0, hottest=-273.0)


class Fleet(Agent):
    """Adds up, and looks at itself twice a second."""

    critical = True
    sensors = (Timer(every=0.5, emit="fleet.tick"),)

    class State(State):
        readings: int = 0
        watt_hours: int = 0
        hottest: float = -273.0
        alarms: int = 0
        curve: list[int] = Field(default_factory=list)
        """The readings at each tick, of the last hundred."""

    @on(Told)
    def told(self, signal: Signal[Told]) -> None:
        """Add."""
        self.state.readings += signal.data.readings
        self.state.watt_hours += signal.data.watt_hours
        self.state.hottest = max(self.state.hottest, signal.data.hottest)

    @on(Hot)
    def hot(self, signal: Signal[Hot]) -> None:
        """Count."""
        self.state.alarms += 1

    @on("fleet.tick")
    def tick(self, signal: Signal[Any]) -> None:
        """Note how far it is."""
        self.state.curve = [*self.state.curve[-99:], self.state.readings]
