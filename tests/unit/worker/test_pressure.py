from worker.pressure import LEAVING_MAX_S, Line, Pressure


def test_nobody_leaves_while_everybody_has_memory() -> None:
    assert Pressure().suspend([1, 2], 0.0) is None


def test_the_last_to_come_leaves_for_the_others() -> None:
    pressure = Pressure()
    pressure.lacks(3)
    assert pressure.high
    assert pressure.suspend([3, 9, 5], 0.0) == 9
    assert pressure.high, "it has not grown yet"


def test_one_that_lacks_memory_and_came_last_leaves_itself() -> None:
    pressure = Pressure()
    pressure.lacks(5)
    assert pressure.suspend([1, 5], 0.0) == 5
    assert not pressure.high


def test_the_memory_of_one_that_leaves_is_waited_for() -> None:
    pressure = Pressure()
    pressure.lacks(1)
    assert pressure.suspend([1, 2, 3], 0.0) == 3
    assert pressure.suspend([1, 2], 1.0) is None
    pressure.left(3)
    assert pressure.suspend([1, 2], 1.0) == 2, "it was not enough"


def test_one_that_does_not_leave_is_waited_for_no_longer_than_patience() -> None:
    pressure = Pressure()
    pressure.lacks(1)
    assert pressure.suspend([1, 2, 3], 0.0) == 3
    assert pressure.suspend([1, 2], LEAVING_MAX_S) == 2


def test_who_has_grown_needs_nobody_to_leave() -> None:
    pressure = Pressure()
    pressure.lacks(1)
    pressure.has(1)
    assert not pressure.high
    assert pressure.suspend([1, 2], 0.0) is None


def test_with_nobody_running_nobody_leaves() -> None:
    pressure = Pressure()
    pressure.lacks(1)
    assert pressure.suspend([], 0.0) is None


def test_the_first_to_come_is_first_in_the_line_whenever_it_joins() -> None:
    line = Line()
    line.join(7)
    assert not line.is_first(8)
    line.join(3)
    assert len(line) == 2
    assert line.is_first(3)
    assert not line.is_first(7)
    line.leave(3)
    assert line.is_first(7)


def test_in_an_empty_line_everybody_is_first() -> None:
    assert Line().is_first(12)
