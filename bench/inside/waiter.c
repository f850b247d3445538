/* SPDX-License-Identifier: LGPL-2.1-or-later */
/* A process that waits for a signal in as little memory as possible. Linked statically: it runs in any release. */

#include <unistd.h>

int main(void) {
        for (;;)
                pause();
}
