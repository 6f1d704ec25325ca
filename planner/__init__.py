"""The planner: a `Problem` of integers in, a `Schedule` out. Imports no torch."""

from chunkft_compile.planner.artefacts import Fingerprint, Plan, PlanMismatch, check_fingerprint, traces_of
from chunkft_compile.planner.drafts import Prefer
from chunkft_compile.planner.explaining import budget_error, smallest_budget
from chunkft_compile.planner.methods import method_problem, restrict
from chunkft_compile.planner.planning import plan, plan_method, plans, sketch
from chunkft_compile.planner.problem import (
    BudgetError,
    Chunk,
    Cost,
    Kind,
    Link,
    Placement,
    Places,
    Problem,
    Role,
    Schedule,
    Segment,
    Step,
    StepsError,
    Update,
)
from chunkft_compile.planner.program import Instruction, Moment, Op, Program, Timeline, simulate
from chunkft_compile.planner.residency import place_state, transfer_us
from chunkft_compile.planner.schedules import format_schedule, from_json, to_json
from chunkft_compile.planner.traces import Category, Instant, Lifetime, Trace
from chunkft_compile.planner.verifying import VerifyError, verify

__all__ = [
    "BudgetError",
    "Category",
    "Chunk",
    "Cost",
    "Fingerprint",
    "Instant",
    "Instruction",
    "Kind",
    "Lifetime",
    "Link",
    "Moment",
    "Op",
    "Placement",
    "Places",
    "Plan",
    "PlanMismatch",
    "Prefer",
    "Problem",
    "Program",
    "Role",
    "Schedule",
    "Segment",
    "Step",
    "StepsError",
    "Timeline",
    "Trace",
    "Update",
    "VerifyError",
    "budget_error",
    "check_fingerprint",
    "format_schedule",
    "from_json",
    "method_problem",
    "place_state",
    "plan",
    "plan_method",
    "plans",
    "restrict",
    "simulate",
    "sketch",
    "smallest_budget",
    "to_json",
    "traces_of",
    "transfer_us",
    "verify",
]
