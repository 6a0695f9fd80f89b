"""Types that cross package borders, the replay store, its sampler, and robot-log ingestion. Imports no sibling."""
