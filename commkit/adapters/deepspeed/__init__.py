"""DeepSpeed: a block of ``ds_config`` in place of its own all-reduce. The public side is :mod:`commkit.deepspeed`."""
