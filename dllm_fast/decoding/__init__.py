"""From a prompt to tokens: requests, steps, schedules, caches' refreshes, remasking."""
