from sia import seeds


def test_streams_are_functions_of_seed_and_name() -> None:
    assert seeds.stream_seed(0, "meta/1/0") == 1688611584
    assert seeds.stream(3, "a").random() == seeds.stream(3, "a").random()
    assert seeds.stream(3, "a").random() != seeds.stream(3, "b").random()
    assert seeds.stream(3, "a").random() != seeds.stream(4, "a").random()
