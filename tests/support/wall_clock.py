"""A wall clock that jumps: a small C library for LD_PRELOAD that adds seconds to it as soon as a file exists. The monotonic clock is
untouched, as when an administrator or NTP sets the clock.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

LIBRARY = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>
static time_t jump(void) { return access(getenv("JUMP_FILE"), F_OK) ? 0 : atol(getenv("JUMP_SECONDS")); }
int clock_gettime(clockid_t clock, struct timespec *found) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int failed = real(clock, found);
  if (clock == CLOCK_REALTIME) found->tv_sec += jump();
  return failed;
}
int gettimeofday(struct timeval *found, void *zone) {
  struct timespec now;
  (void)zone;
  clock_gettime(CLOCK_REALTIME, &now);
  found->tv_sec = now.tv_sec;
  found->tv_usec = now.tv_nsec / 1000;
  return 0;
}
time_t time(time_t *found) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (found) *found = now.tv_sec;
  return now.tv_sec;
}
"""


def built(folder: Path) -> Path | None:
    """The library, compiled in `folder`; None without a C compiler."""
    if (compiler := shutil.which("cc") or shutil.which("gcc")) is None:
        return None
    (folder / "clock.c").write_text(LIBRARY)
    words = [compiler, "-shared", "-fPIC", "-o", str(folder / "clock.so"), str(folder / "clock.c"), "-ldl"]
    subprocess.run(words, check=True, capture_output=True)
    return folder / "clock.so"


def jumping(library: Path, mark: Path, seconds: int) -> dict[str, str]:
    """The environment of a process whose wall clock is `seconds` ahead while the file `mark` exists."""
    return {"LD_PRELOAD": str(library), "JUMP_FILE": str(mark), "JUMP_SECONDS": str(seconds)}
