/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Who is a regular user by number, while polytmpd cannot be asked. It has the same rule in core/policy.py; the tests
 * compare the two. Not here: what its configuration and user records say (RegularUIDs=, groups): a user who would be
 * exempt by those is refused meanwhile.
 */

#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#define UID_MIN_DEFAULT 1000
#define UID_MAX_DEFAULT 60000

static inline bool is_regular_uid(uid_t uid, unsigned long uid_min) {
        static const struct { uid_t first, last; } NOT_REGULAR[] = { /* https://systemd.io/UIDS-GIDS/ */
                { 60578, 60705 },           /* greeters of display managers */
                { 61184, 65519 },           /* dynamic users; also Debian's static system users (slurm 64030) */
                { 65534, 65535 },           /* nobody */
                { 2147352576, 2147418111 }, /* foreign users of disk images */
                { 2147483647, 4294967295 }, /* reserved */
        };

        for (size_t i = 0; i < sizeof(NOT_REGULAR) / sizeof(NOT_REGULAR[0]); i++)
                if (uid >= NOT_REGULAR[i].first && uid <= NOT_REGULAR[i].last)
                        return false;
        return uid >= uid_min;
}
