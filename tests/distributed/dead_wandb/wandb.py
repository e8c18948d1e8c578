"""Stands for a W&B whose server takes connections and answers nothing: every call waits for ever."""

import time


def init(**kwargs: object) -> None:
    time.sleep(1e6)


log = finish = init
