"""gradio's server, for posts that no page sends: one line of an error in the place of a traceback, and no sign of a bug.

In:  an imported gradio.  Out: the class of the page, and options of `launch`.
"""

from __future__ import annotations

from typing import Any

REFUSAL = "this is not what the page sends"


def checked_blocks(gradio: Any) -> type:
    """gradio.Blocks that refuse values which their components cannot read."""

    class CheckedBlocks(gradio.Blocks):
        async def preprocess_data(self, *arguments: Any, **options: Any) -> Any:
            try:
                return await super().preprocess_data(*arguments, **options)
            except Exception as error:  # whatever a component raises, it is about the value that was posted
                raise gradio.Error(REFUSAL, print_exception=False) from error

    return CheckedBlocks


def app_options() -> dict[str, Any]:
    """Options of the web application: an address or a number of a function that it does not know is the client's mistake."""
    from gradio.route_utils import FnIndexInferError
    from starlette.responses import JSONResponse

    def refuse(request: Any, error: Exception) -> JSONResponse:
        return JSONResponse({"detail": REFUSAL}, 400)

    return {"exception_handlers": dict.fromkeys((FnIndexInferError, LookupError, ValueError, TypeError), refuse)}
