void test_every_level();

int main() { test_every_level(); }
