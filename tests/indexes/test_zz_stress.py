import sys; sys.path.insert(0,"/work/main")
from tests.indexes.test_engines import *
TestHistories.settings = settings(max_examples=150, stateful_step_count=50, deadline=None, database=None, suppress_health_check=list(HealthCheck))
def test_x(): TestHistories("runTest").runTest()
