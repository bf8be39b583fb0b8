"""`TopView`: the live view of ``promptmill top``."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar
from uuid import UUID

import orjson
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import DataTable, Footer, Static

from schema.errors import PromptmillError
from workers.cli.top import QUEUES, WORKERS, queue_rows, summary, worker_rows
from workers.overview import Overview, Watcher

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from schema.jobs import JobStatus
    from workers.aio_client import AsyncJobClient

_JOBS = ("job", "state", "since", "error", "attempts", "model")


class JobScreen(ModalScreen[None]):
    """All that is known of one job.

    Args:
        text: What is shown.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,enter", "dismiss", "back")]

    def __init__(self, text: str) -> None:
        super().__init__()
        self._text = text

    def compose(self) -> ComposeResult:
        """Make the widgets."""
        with VerticalScroll():
            yield Static(self._text, markup=False)


class JobTable(DataTable[str]):
    """The jobs; the footer names the key that looks into one."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select_cursor", "look into", key_display="enter")
    ]


class TopView(App[None]):
    """Workers above, queues below, then jobs that can be chosen.

    Args:
        client: Connected to the deployment.
        every_s: Seconds between two looks.
        namespace: Whose jobs are shown.
    """

    TITLE = "promptmill top"
    CSS = """
        #workers, #queues { height: auto; max-height: 30%; margin-bottom: 1; }
        #jobs { height: 1fr; }
        JobScreen { padding: 2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("c", "cancel", "cancel"),
        Binding("r", "retry", "run once more"),
        Binding("q", "quit", "quit"),
    ]

    def __init__(
        self, client: AsyncJobClient, *, every_s: float = 2.0, namespace: str | None = None
    ) -> None:
        super().__init__()
        self._client = client
        self._namespace = namespace
        self._every_s = every_s
        self._watcher = Watcher(client, namespace=namespace)
        self._unchosen: UUID | None = None  # where the cursor fell when the chosen job went away

    def compose(self) -> ComposeResult:
        """Make the widgets."""
        yield Static("looking…", id="head")
        yield DataTable(id="workers", cursor_type="none")
        yield DataTable(id="queues", cursor_type="none")
        yield JobTable(id="jobs", cursor_type="row")
        yield Footer()

    async def on_mount(self) -> None:
        """Begin to look."""
        for name, columns in (("workers", WORKERS), ("queues", QUEUES), ("jobs", _JOBS)):
            self._table(name).add_columns(*columns)
        self._table("jobs").focus()
        self.set_interval(self._every_s, self.look)
        await self.look()

    async def look(self) -> None:
        """Look once, and show it; what cannot be reached is said."""
        try:
            seen = await self._watcher.look()
        except PromptmillError as exc:
            self._head().update(f"waiting: {exc}")
            return
        self._head().update(summary(seen))
        self._fill(seen)

    def _fill(self, seen: Overview) -> None:
        for name, rows in (("workers", worker_rows(seen)), ("queues", queue_rows(seen))):
            shown = self._table(name)
            shown.clear()
            shown.add_rows(rows)
        self._fill_jobs(seen)

    def _fill_jobs(self, seen: Overview) -> None:
        """Show the jobs; the cursor stays on its job, wherever that is now."""
        jobs = self._table("jobs")
        row, chosen = jobs.cursor_row, self._under_cursor()
        shown = (*seen.slow, *seen.failed)
        jobs.clear()
        for job in shown:
            jobs.add_row(*_job_row(job, seen), key=str(job.job_id))
        if not shown:
            return
        ids = [job.job_id for job in shown]
        gone = chosen is not None and chosen not in ids
        jobs.move_cursor(
            row=min(row, len(ids) - 1) if chosen is None or gone else ids.index(chosen)
        )
        if gone:
            self._unchosen = self._under_cursor()

    async def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        """Look into the job that was chosen."""
        if event.row_key.value is None:
            return
        job_id = UUID(event.row_key.value)
        try:
            status = await self._client.status(job_id, namespace=self._namespace)
            request = await self._client.request(job_id, namespace=self._namespace)
        except PromptmillError as exc:
            self.notify(str(exc), severity="error")
            return
        known = {"job": status.model_dump(mode="json"), "request": request}
        text = orjson.dumps(known, option=orjson.OPT_INDENT_2).decode()
        await self.push_screen(JobScreen(text))

    async def action_cancel(self) -> None:
        """Cancel the chosen job."""
        if (job_id := self._chosen()) is not None:
            await self._do("cancelled", self._client.cancel(job_id, namespace=self._namespace))

    async def action_retry(self) -> None:
        """Run the chosen job once more."""
        if (job_id := self._chosen()) is not None:
            await self._do("queued again", self._client.retry(job_id, namespace=self._namespace))

    async def _do(self, done: str, call: Awaitable[object]) -> None:
        try:
            changed = await call
        except PromptmillError as exc:
            self.notify(str(exc), severity="error")
        else:
            self.notify(done if changed else "nothing to change: it is over, or runs")
            await self.look()

    def _chosen(self) -> UUID | None:
        """Return the job to act upon; none when the cursor came to it by itself."""
        job_id = self._under_cursor()
        fell, self._unchosen = self._unchosen, None
        if job_id is not None and job_id == fell:
            self.notify("the job that was chosen left the list; press again for this one")
            return None
        return job_id

    def _under_cursor(self) -> UUID | None:
        jobs = self._table("jobs")
        if not jobs.row_count:
            return None
        key = jobs.coordinate_to_cell_key(jobs.cursor_coordinate).row_key.value
        return None if key is None else UUID(key)

    def _head(self) -> Static:
        return self.query_one("#head", Static)

    def _table(self, name: str) -> DataTable[str]:
        return self.query_one(f"#{name}", DataTable)


def _job_row(job: JobStatus, seen: Overview) -> tuple[str, ...]:
    since = (seen.at - (job.finished_at or job.started_at or job.created_at)).total_seconds()
    error = job.error.message.splitlines()[0][:60] if job.error and job.error.message else ""
    since_text = f"{max(since, 0):.0f} s"
    return str(job.job_id), job.state.value, since_text, error, str(job.attempts), job.model
