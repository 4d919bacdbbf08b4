"""Which tests inject which kind of fault; `python -m tests.faults.kinds` prints docs/results/reliability.md."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import NamedTuple

from tests.faults.figures import results, section

ROOT = Path(__file__).resolve().parents[2]


class Kind(NamedTuple):
    """outcome: what must follow; tests: "file::function" below tests/."""

    name: str
    outcome: str
    tests: tuple[str, ...]


KINDS = (
    Kind("rank killed, also by the kernel for lack of memory", "resumed run equals an undisturbed one; the cause names the rank", (
        "laws/test_main_job.py::test_a_signal_saves_and_a_kill_loses_only_what_was_not_saved",
        "run/test_failures.py::test_the_cause_on_another_rank_is_in_the_journal_on_the_console_and_in_its_log",
        "run/test_failures.py::test_a_killed_rank_is_named_by_the_rank_whose_connection_it_closed",
        "launch/test_local_real.py::test_a_rank_that_is_killed_ends_all_with_another_code",
        "faults/test_out_of_memory.py::test_a_rank_that_the_kernel_kills_for_memory_starts_again",
        "faults/test_random_moments.py::test_a_run_survives_faults_at_random_moments",
    )),
    Kind("rank stopped (SIGSTOP)", "the others end within `engine.timeout` and name it and its place", (
        "faults/test_stopped_rank.py::test_a_stopped_rank_is_named_with_its_place_and_the_run_ends",
        "faults/test_stopped_rank.py::test_a_stopped_rank_0_that_holds_the_store_ends_the_others_too",
        "engine/test_heartbeat.py::test_a_rank_that_never_comes_is_named_at_the_limit_of_the_start",
        "faults/test_stopped_rank.py::test_a_rank_that_stops_while_it_imports_is_named_before_the_process_group_exists",
        "faults/test_stopped_rank.py::test_no_rank_leaves_before_all_have_come_to_the_end_of_the_run",
        "launch/test_local.py::test_a_rank_that_is_stopped_while_the_others_exit_is_killed",
        "faults/test_stopped_rank.py::test_a_job_whose_rank_0_is_stopped_after_the_last_line_ends_well",
        "faults/test_random_moments.py::test_a_run_survives_faults_at_random_moments",
    )),
    Kind("loader worker stopped, killed, or hung in fork()", "named, with the signal; no fork beside a process group", (
        "data/loader/test_workers.py::test_a_killed_worker_is_named_with_its_signal_and_a_remedy",
        "data/loader/test_workers.py::test_a_worker_that_stands_still_ends_the_wait_by_name",
        "data/loader/test_workers.py::test_a_sigterm_to_a_worker_that_is_being_born_does_not_end_it",
        "data/loader/test_workers.py::test_nothing_forks_once_the_process_group_exists",
        "faults/test_random_moments.py::test_a_run_survives_faults_at_random_moments",
    )),
    Kind("failed attempt, requeue", "started again while checkpoints advance, then given up", (
        "launch/test_restarts.py::test_restarts_as_long_as_checkpoints_advance",
        "launch/test_restarts.py::test_local_starts_a_crashing_run_again_only_with_resume",
        "launch/test_restarts.py::test_a_failed_slurm_job_is_requeued_as_long_as_checkpoints_advance",
    )),
    Kind("launcher killed", "ranks notice, save and end", (
        "laws/test_stop_and_resume.py::test_a_rank_whose_launcher_was_killed_saves_and_ends",
        "laws/test_stop_and_resume.py::test_the_end_of_a_launcher_is_noticed",
        "faults/test_random_moments.py::test_a_run_survives_faults_at_random_moments",
    )),
    Kind("signals: in steps, evaluation, save, start-up", "saved, exit code 75; nothing lost or repeated", (
        "laws/test_stop_and_resume.py::test_interrupted_anywhere_is_uninterrupted",
        "launch/test_local.py::test_a_signal_of_slurm_that_comes_while_ranks_import_is_not_lost",
        "launch/test_slurm_real.py::test_a_job_that_the_administrator_requeues_continues",
        "faults/test_random_moments.py::test_a_run_survives_faults_at_random_moments",
    )),
    Kind("node lost, or unusable before an attempt", "the others continue, or the job starts again without it", (
        "launch/test_health.py::test_what_makes_a_node_unusable",
        "launch/test_health.py::test_failing_hosts_are_replaced_or_left_out",
        "launch/test_nodes.py::test_a_lost_node_ends_the_job_or_not_as_it_may",
        "launch/test_hosts_real.py::test_of_two_elastic_hosts_one_is_lost_and_the_other_continues",
        "launch/test_hosts_real.py::test_a_host_that_loses_its_power_is_replaced_by_the_spare_without_a_person",
        "launch/test_elastic_real.py::test_a_node_that_is_lost_leaves_the_other_to_go_on_from_the_checkpoint",
        "launch/test_slurm_real.py::test_a_job_outlives_a_node",
    )),
    Kind("network cut between hosts", "a cut that heals costs its time; a longer one ends the job by name, and a resume continues", (
        "faults/test_stopped_rank.py::test_a_stopped_rank_is_named_with_its_place_and_the_run_ends",
        "faults/test_network_cuts.py::test_a_cut_that_heals_costs_only_its_time",
        "faults/test_network_cuts.py::test_a_longer_cut_ends_the_job_by_name_and_a_resume_continues",
        "faults/test_random_moments.py::test_a_run_survives_faults_at_random_moments",
    )),
    Kind("slow node", "named in journal and report", (
        "telemetry/test_step_phases.py::test_spreads_over_ranks_name_the_slowest",
        "launch/test_health.py::test_what_makes_a_node_unusable",
        "faults/test_random_moments.py::test_a_run_survives_faults_at_random_moments",
    )),
    Kind("disk full", "the previous checkpoint stays whole; lines of the journal wait in memory", (
        "checkpoint/test_power_loss.py::test_no_partial_file_is_left_behind_on_a_full_disk",
        "journal/test_journal.py::test_lines_wait_in_memory_while_the_disk_is_full",
        "laws/test_stop_and_resume.py::test_a_write_that_failed_in_the_background_is_raised_on_all_ranks_and_the_one_before_is_there",
        "faults/test_random_moments.py::test_a_run_survives_faults_at_random_moments",
    )),
    Kind("read-only file system or immutable file in mid-run", "ends with the file and the remedy; a usable checkpoint stays", (
        "journal/test_journal.py::test_a_journal_that_can_not_be_written_any_more_ends_the_run_by_its_name",
        "checkpoint/test_power_loss.py::test_an_error_at_any_call_leaves_a_usable_one_and_the_next_save_cleans_up",
        "faults/test_random_moments.py::test_a_run_survives_faults_at_random_moments",
    )),
    Kind("run directory removed, renamed or replaced", "the run ends before its next checkpoint and is not begun anew", (
        "launch/test_restarts.py::test_a_run_whose_checkpoints_are_gone_is_not_begun_anew",
        "launch/test_restarts.py::test_a_slurm_job_whose_checkpoints_are_gone_is_not_begun_anew",
        "journal/test_journal.py::test_a_run_directory_that_is_taken_away_is_noticed_before_the_next_checkpoint",
        "faults/test_random_moments.py::test_a_run_survives_faults_at_random_moments",
    )),
    Kind("power loss at any write", "the previous checkpoint or the new one", (
        "checkpoint/test_power_loss.py::test_a_crash_at_any_point_leaves_the_previous_one_or_the_new_one",
        "faults/test_random_moments.py::test_a_run_survives_faults_at_random_moments",
    )),
    Kind("checkpoint damaged", "noticed; the one before is used", (
        "checkpoint/test_checkpoint.py::test_a_damaged_checkpoint_is_skipped_and_reported",
        "faults/test_random_moments.py::test_a_run_survives_faults_at_random_moments",
    )),
    Kind("bit of a weight flipped on one rank", "the run ends before its next checkpoint and names the rank", (
        "faults/test_flipped_bit.py::test_a_flipped_bit_on_one_rank_ends_the_run_before_its_checkpoint",
        "faults/test_flipped_bit.py::test_every_flipped_bit_changes_the_digest",
    )),
    Kind("store fails for a while, stays away, trickles", "the same batches; else ends with its name", (
        "laws/test_remote_job.py::test_two_processes_over_http_with_faults_train_as_over_files",
        "data/remote/test_http_and_s3.py::test_a_server_that_stays_away_ends_the_run_by_its_name",
        "data/remote/test_hostile_servers.py::test_a_trickling_server_is_taken_up_where_it_stopped",
        "faults/test_random_moments.py::test_a_run_survives_faults_at_random_moments",
    )),
    Kind("shard lost, truncated or replaced", "its images are broken and counted, or the run is refused", (
        "data/loader/test_stream.py::test_a_shard_lost_in_the_run_breaks_its_images_only",
        "run/test_recorder.py::test_broken_validation_images_are_reported_and_refused_past_their_share",
        "data/remote/test_hostile_servers.py::test_a_shard_replaced_in_the_middle",
    )),
    Kind("loss or gradient not finite", "the step is skipped on all ranks; too many end the run", (
        "engine/test_skipped_steps_and_ema.py::test_a_step_that_is_not_finite_on_one_rank_moves_nothing_on_any",
    )),
    Kind("clock set in mid-run", "no duration changes", (
        "safety/test_foreign_bytes.py::test_a_clock_that_is_set_changes_no_duration",
        "faults/test_clock_jumps.py::test_a_clock_that_jumps_under_a_job_changes_no_duration_and_loses_nothing",
        "faults/test_random_moments.py::test_a_run_survives_faults_at_random_moments",
    )),
    Kind("MLflow stopped, slow or full", "training goes on; nothing is lost or doubled", (
        "tracking/test_tracking_server.py::test_answers_that_fail_or_come_too_late_are_neither_lost_nor_doubled",
        "tracking/test_tracking.py::test_a_full_disk_does_not_end_the_shipping",
    )),
)  # fmt: skip

NOT_DONE = "NCCL (no GPU), more than 2 processes in the tests of this page"


def is_slow(test: str) -> bool:
    """Whether a test runs in `make test-all` only. Raises ValueError where it does not exist."""
    file, _, name = test.partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            marks = [ast.unparse(mark) for mark in node.decorator_list]
            whole = [
                ast.unparse(part.value)
                for part in tree.body
                if isinstance(part, ast.Assign) and "pytestmark" in ast.unparse(part)
            ]
            return any("pytest.mark.slow" in mark and "param(" not in mark for mark in (*marks, *whole))
    raise ValueError(f"tests/{file}: no test {name}")


def _shown(test: str) -> str:
    file, _, name = test.partition("::")
    return f"`tests/{file}`: `{name}`"


def page() -> str:
    """The page as markdown."""
    rows = []
    for kind in KINDS:
        quick, slow = ([_shown(test) for test in kind.tests if is_slow(test) == long] for long in (False, True))
        rows.append(f"| {kind.name} | {kind.outcome} | {'<br>'.join(quick)} | {'<br>'.join(slow)} |")
    return "\n".join(
        [
            "# Faults and their tests",
            "",
            "Made by `python -m tests.faults.kinds > docs/results/reliability.md`. Tests of the last column run in `make test-all`",
            "only. All ran on CPUs over gloo.",
            "",
            "| fault | what must follow | `make test` | `make test-all` |",
            "|---|---|---|---|",
            *rows,
            "",
            *section(results()),
            f"Not tested: {NOT_DONE}.",
            "",
        ]
    )


if __name__ == "__main__":
    print(page(), end="")
