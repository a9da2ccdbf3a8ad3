"""``launch/deepspeed_train.py`` without what DeepSpeed compiles at its first start: started by tests."""

import os
import sys

from tests.deepspeed import world

if __name__ == "__main__":
    world.prepare(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    from launch.deepspeed_train import main

    main(sys.argv[1:])
