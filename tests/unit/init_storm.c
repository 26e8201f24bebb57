/* Processes that flee from being killed, bounded, for tests/unit/test_init_commands.py: `storm comet|swarm TOTAL`.
 * A comet is one process that forks and exits without end; a swarm is many that fork and stay. Every child makes a
 * session of its own. TOTAL bounds the forks of the whole storm; at the end of its forks a process sleeps. */
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    int comet = strcmp(argv[1], "comet") == 0;
    int *left = mmap(NULL, sizeof *left, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (left == MAP_FAILED)
        return 1;
    *left = atoi(argv[2]);
    signal(SIGTERM, SIG_IGN);
    signal(SIGCHLD, SIG_IGN);
    while (__atomic_fetch_sub(left, 1, __ATOMIC_SEQ_CST) > 0) {
        pid_t pid = fork();
        if (pid == 0)
            (void)setsid();
        else if (comet)
            _exit(0);
    }
    for (;;)
        pause();
}
