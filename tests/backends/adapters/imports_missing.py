"""An adapter whose library is not installed anywhere."""

import a_library_that_is_not_there  # type: ignore[import-not-found]

run = a_library_that_is_not_there.run
