"""Train a student from a teacher, from the command line.

    python -m trainer.entrypoint --block_size=512 --teacher_name=gpt2-xl \
        --dataset_name=wikitext --dataset_config=wikitext-103-raw-v1 \
        --alpha_schedule=0:0.7,400:0.5,800:0.3 --temp_schedule=0:1.2,800:1.0 \
        --eval_ctx_lens=512,1024 --output_gcs_uri='gs://BUCKET/run-$(date +%Y%m%d)'

Started again with the same settings, it goes on from its own newest snapshot.
"""

from __future__ import annotations

from trainer.runtime.signals import watch_signals

if __name__ == "__main__":
    watch_signals()  # before anything is imported that takes a while

from trainer.runtime.commands import run_command
from trainer.runtime.log import quiet_libraries, rank_of_process, set_up_logging
from trainer.runtime.processes import joined_processes
from trainer.settings.flags import build_parser, settings_from_args
from trainer.settings.layers import resolve, settings_from_yaml
from trainer.training.run import check_before_reading, launch, run, run_on_all_gpus

__all__ = ["main", "run", "run_on_all_gpus"]


def main(argv: list[str]) -> None:
    """Parse flags and train."""
    parser = build_parser(
        "python -m trainer.entrypoint", "Train a student from a teacher by distillation."
    )
    args = parser.parse_args(argv)
    set_up_logging(rank=rank_of_process())
    command_line = settings_from_args(args)
    config_file = settings_from_yaml(args.config) if "config" in args else {}
    check_before_reading(resolve(command_line, config_file))
    if launch(command_line):
        return
    quiet_libraries()
    with joined_processes() as processes:
        run(command_line, config_file, processes)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
