"""Update rules as pure functions, and schedules."""
