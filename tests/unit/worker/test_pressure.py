from worker.pressure import LEAVING_MAX_S, Arrival, Line, Pressure


def came(*numbers: int) -> list[Arrival]:
    return [Arrival(False, number) for number in numbers]


def late(number: int) -> Arrival:
    return Arrival(True, number)


def test_nobody_leaves_while_everybody_has_memory() -> None:
    assert Pressure().suspend(came(1, 2), 0.0) is None


def test_the_last_to_come_leaves_for_the_others() -> None:
    pressure = Pressure()
    pressure.lacks(*came(3))
    assert pressure.high
    assert pressure.suspend(came(3, 9, 5), 0.0) == Arrival(False, 9)
    assert pressure.high, "it has not grown yet"


def test_one_that_lacks_memory_and_came_last_leaves_itself() -> None:
    pressure = Pressure()
    pressure.lacks(*came(5))
    assert pressure.suspend(came(1, 5), 0.0) == Arrival(False, 5)
    assert not pressure.high


def test_the_memory_of_one_that_leaves_is_waited_for() -> None:
    pressure = Pressure()
    pressure.lacks(*came(1))
    assert pressure.suspend(came(1, 2, 3), 0.0) == Arrival(False, 3)
    assert pressure.suspend(came(1, 2), 1.0) is None
    pressure.left(*came(3))
    assert pressure.suspend(came(1, 2), 1.0) == Arrival(False, 2), "it was not enough"


def test_one_that_does_not_leave_is_waited_for_no_longer_than_patience() -> None:
    pressure = Pressure()
    pressure.lacks(*came(1))
    assert pressure.suspend(came(1, 2, 3), 0.0) == Arrival(False, 3)
    assert pressure.suspend(came(1, 2), LEAVING_MAX_S) == Arrival(False, 2)


def test_who_has_grown_needs_nobody_to_leave() -> None:
    pressure = Pressure()
    pressure.lacks(*came(1))
    pressure.has(*came(1))
    assert not pressure.high
    assert pressure.suspend(came(1, 2), 0.0) is None


def test_with_nobody_running_nobody_leaves() -> None:
    pressure = Pressure()
    pressure.lacks(*came(1))
    assert pressure.suspend(came(), 0.0) is None


def test_the_first_to_come_is_first_in_the_line_whenever_it_joins() -> None:
    line = Line()
    line.join(*came(7))
    assert not line.is_first(*came(8))
    line.join(*came(3))
    assert len(line) == 2
    assert line.is_first(*came(3))
    assert not line.is_first(*came(7))
    line.leave(*came(3))
    assert line.is_first(*came(7))


def test_in_an_empty_line_everybody_is_first() -> None:
    assert Line().is_first(*came(12))


def test_the_background_comes_after_all_others_whenever_it_came() -> None:
    pressure = Pressure()
    pressure.lacks(*came(9))
    assert pressure.suspend([*came(9), late(1), late(2)], 0.0) == late(2)
    line = Line()
    for step in (late(1), late(4), *came(7)):
        line.join(step)
    assert line.is_first(*came(7))
    assert line.is_first(*came(5)), "it need not be in the line"
    assert not line.is_first(late(0))
    assert [line.before(step) for step in (late(4), late(1), *came(9))] == [2, 1, 1]


def test_the_background_leaves_for_one_that_waits_and_nobody_else_does() -> None:
    pressure = Pressure()
    pressure.waits(late(8))
    assert pressure.suspend([*came(1), late(2)], 0.0) is None
    pressure.waits(*came(9))
    assert not pressure.high
    assert pressure.suspend(came(1, 2), 0.0) is None
    assert pressure.suspend([*came(1), late(2), late(3)], 0.0) == late(3)
    assert pressure.suspend([*came(1), late(2)], 0.1) is None, "it is still leaving"
    pressure.left(late(3))
    pressure.waits_no_more(*came(9))
    assert pressure.suspend([*came(1), late(2)], 0.2) is None


def test_a_step_of_the_background_that_cannot_grow_holds_up_its_kind_only() -> None:
    pressure = Pressure()
    pressure.lacks(late(1))
    assert pressure.holds_up(late(2))
    assert not pressure.holds_up(*came(3))
    pressure.lacks(*came(2))
    assert pressure.holds_up(*came(3))
