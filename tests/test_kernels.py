"""What ran is heard by whoever listens, and by nobody after."""

from hhbench.kernels import kernels, ran


def test_everyone_who_listens_hears_what_ran_and_how_often():
    ran("before")
    with kernels() as outer:
        ran("a")
        with kernels() as inner:
            ran("a")
        ran("b")
    ran("after")
    assert outer == {"a": 2, "b": 1} and inner == {"a": 1}
